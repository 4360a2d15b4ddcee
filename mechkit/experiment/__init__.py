"""What techniques share: axes of a result, positions, provenance, gradients, edges. See README.md here."""
