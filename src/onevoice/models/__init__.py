"""Networks: batches in, estimates out; they know nothing of data."""
