"""`python -m hf_disparse` is `hf-disparse`, for launchers: `torchrun --nproc-per-node 2 -m hf_disparse train RECIPE`."""

from hf_disparse.cli.main import main

if __name__ == "__main__":
    main()
