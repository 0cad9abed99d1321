"""Evaluation: rate-distortion of real bitstreams beside the peers; JSON per photo, tables and plots drawn from it."""
