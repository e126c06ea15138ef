"""What every speed and quality claim is measured with: ``python -m benchmarks [NAMES] [--quick]``."""
