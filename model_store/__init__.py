"""The model store and what makes it: trained models, their trainer and their evaluation."""
