"""Memory and arithmetic of a run before it starts: one step of the real trainer on tensors without memory."""
