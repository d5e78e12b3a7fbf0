"""What tasks need of the weights they share: measures, figures and a report. Layer 7."""
