"""Reports as evidence for others: in-toto statements, a bill of materials, a section of a model card."""
