"""ggml's searches once more, for many blocks side by side.

ggml looks for the scale of one block after the other. Here one step of the search is taken for ``LANES`` blocks before
the next, so a compiler turns it into vector instructions. Within a block every float32 operation is the same and in the
same order, so the outcome is the same bits, several times sooner. Nothing is trusted to that: see
:mod:`qcbguard_plugins.backends.ggml.checked`.

References:
    ggml ``ggml-quants.c``: ``make_qx_quants``, ``make_q3_quants``, ``make_qkx2_quants``, ``make_qkx3_quants``,
    ``make_qp_quants``, ``quantize_row_iq4_nl_impl`` and the functions of the types around them.
"""
