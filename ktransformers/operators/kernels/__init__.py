"""Pure functions on tensors that operators on a GPU compute with: Triton beside its reference."""
