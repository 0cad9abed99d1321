"""Training: photos, degradations, warm start, the loop, and the export of a run into the store."""
