"""Operators: what rules may name. Each imports the core and kernels, never another operator."""
