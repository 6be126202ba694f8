"""What is done to every weight, compiled with numba, for a processor.

Nothing here is another definition: each kernel gives the bits that the torch code beside it gives, and tests hold them
to that. Without numba the torch code does the work.
"""
