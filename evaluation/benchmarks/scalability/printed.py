"""Scalability as the paper prints it: the rows of Table 5 and the exponents of Proposition 1."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrintedSetup:
    """A row of Table 5, as printed.

    Attributes:
        depth: Convolutions.
        width: Channels of the first.
        params: Parameters.
        ekfac: Setup of its EKFAC in seconds, or "OOM".
        stride: Setup of STRIDE in seconds.
    """

    depth: int
    width: int
    params: str
    ekfac: str
    stride: str


TABLE5 = (
    PrintedSetup(4, 64, "262K", "6.43", "3.27"),
    PrintedSetup(6, 128, "4.6M", "5.72", "2.13"),
    PrintedSetup(6, 160, "7.2M", "6.79", "2.43"),
    PrintedSetup(6, 192, "10.3M", "7.77", "2.26"),
    PrintedSetup(8, 128, "18.8M", "11.68", "2.37"),
    PrintedSetup(8, 160, "29.3M", "15.78", "2.35"),
    PrintedSetup(8, 192, "42.2M", "OOM", "2.46"),
    PrintedSetup(8, 256, "75.0M", "OOM", "3.03"),
    PrintedSetup(10, 256, "150.5M", "OOM", "3.89"),
    PrintedSetup(12, 512, "299.7M", "OOM", "7.31"),
    PrintedSetup(14, 512, "375.2M", "OOM", "8.19"),
    PrintedSetup(16, 512, "450.7M", "OOM", "9.05"),
    PrintedSetup(18, 512, "526.3M", "OOM", "9.94"),
    PrintedSetup(20, 512, "601.8M", "OOM", "10.80"),
    PrintedSetup(22, 512, "677.3M", "OOM", "11.69"),
    PrintedSetup(24, 512, "752.8M", "OOM", "12.59"),
    PrintedSetup(14, 768, "844.2M", "OOM", "13.63"),
    PrintedSetup(16, 768, "1.0B", "OOM", "15.23"),
)
TABLE5_NOTE = (
    "Table 5: 5,000 examples on one H100. Its counts of parameters are those with batch norm, which adds at "
    "most .3%; ours have none. It does not say how maps are pooled, nor N_Fisher of its EKFAC (DiagonalEKFAC "
    "here; true EKFAC stands beside it). Its text says OOM from depth 8 on; the table has it from 8 x 192 on."
)

#: Proposition 1: for each method and cost, the exponent of a quantity when the others are fixed. For EKFAC, P
#: grows with L at fixed d (exponent 1) or with d at fixed L (d^3 = P^1.5). STRIDE's costs do not include the
#: forward pass of the model.
PROPOSITION1: dict[str, dict[str, dict[str, str]]] = {
    "STRIDE": {
        "setup": {"N": "0 to 1", "d": "2", "K": "1", "P": "0"},
        "inference": {"N": "0", "d": "2", "K": "1", "P": "0"},
        "memory": {"N": "0 to 1", "d": "2", "K": "1", "P": "0"},
    },
    "EKFAC": {
        "setup": {"N": "0", "P": "1 to 1.5"},
        "inference": {"N": "1", "P": "1 to 1.5"},
        "memory": {"N": "0", "P": "1"},
    },
}
PROPOSITION1_NOTE = (
    "Proposition 1: STRIDE's setup is O(Ns + T K d^2), a query O(T_lasso K s + K d^2) and memory "
    "O(Ns + K d^2), without the frozen model's forward pass; EKFAC's are O(N_Fisher L d^3), O(N L d^3) and "
    "O(L d^2), with P = Theta(L d^2). It says nothing of the closed form, whose operations are N d^2 + d^3 "
    "for setup, N d for a query and N d + d^2 numbers."
)
#: Exponents of the closed form, from its operations.
CLOSED_FORM = {
    "setup": {"N": "0 to 1", "d": "2 to 3", "P": "-"},
    "inference": {"N": "1", "d": "1", "P": "-"},
    "memory": {"N": "0 to 1", "d": "1 to 2", "P": "-"},
}
