# Python 3.11 and make are enough: both commands set up .venv first, and the next time do only what is left.
#
#   make quickstart    train, prune and evaluate three tasks on one encoder: recipes/quickstart.yaml
#   make test          the fast tests
#   make test-slow     the others: real data, several processes, a browser
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-slow

quickstart: .venv/quickstart-installed
	$(BIN)/hf-disparse train recipes/quickstart.yaml

test: .venv/test-installed
	$(BIN)/pytest

test-slow: .venv/test-installed
	$(BIN)/pytest -m slow

# An editable install: a change of the code needs none of this again, a change of the dependencies does.
.venv/quickstart-installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,plot]'
	touch $@

.venv/test-installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ .venv/quickstart-installed

.venv/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) was not found; name another Python of at least 3.10: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
