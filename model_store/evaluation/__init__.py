"""Evaluation: rate-distortion of real bitstreams, beside the peers, as JSON per photo; tables and plots drawn from it."""
