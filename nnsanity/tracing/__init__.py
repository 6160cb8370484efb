"""How we look inside any JAX function: reading its program, and running it again."""
