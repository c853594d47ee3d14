"""The mathematics of PMPO as pure functions on tensors: no process group, no Megatron, no run configuration."""
