"""Training: one loop over megatron-core's schedules, its optimizer, its state and its metrics."""
