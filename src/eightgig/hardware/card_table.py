"""Cards: memory, arithmetic, links. Sources stand in docs/reference/cards.md."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from eightgig.units import GIB

# What copies from pinned memory reach, bytes per second, by PCIe generation and lanes: measured 11
# (3.0 x16, RTX 4090) and 50 to 55 (5.0 x16, H100), the others in proportion. An RTX PRO 6000 was
# seen with 27 on 5.0 x16: measure.
PINNED_BYTES_PER_SECOND = {
    (3, 4): 3.1e9,
    (3, 8): 6.3e9,
    (3, 16): 11.5e9,
    (4, 4): 6.5e9,
    (4, 8): 12.5e9,
    (4, 16): 24e9,
    (5, 4): 12.5e9,
    (5, 8): 25e9,
    (5, 16): 50e9,
}
# Laptops: 9.4 of 12.5 (4.0 x8, RTX 3050 Laptop) and 16.7 of 25 (5.0 x8, RTX 5070 Laptop) measured.
LAPTOP_LINK_RATIO = 0.7
# Matrix products of a decoder layer reach about 86 % of the arithmetic limit; laptops do not hold
# their boost clock, in proportion.
GEMM_RATIO = 0.86
LAPTOP_GEMM_RATIO = 0.82
MEMORY_RATIO = 0.85
# deviceQuery shows one copy engine on GeForce cards up to the RTX 3070, two on the RTX 3090.
_TWO_COPY_ENGINES = ("3080", "3090", "4080", "4090", "5080", "5090", "A10", "L4", "A100", "H100")


@dataclass(frozen=True, slots=True)
class Card:
    """One card as its maker describes it.

    Attributes:
        name: As the driver writes it, without `NVIDIA`; the memory is added where two cards of
            one name differ in it.
        memory_gib: GiB on the box.
        compute_capability: (major, minor).
        multiprocessors: SMs that are enabled.
        boost_mhz: Boost clock.
        flops_per_clock: Of the tensor cores of one SM with 16-bit factors and float32 sums.
        memory_gb_per_second: Peak of its memory, in 10^9 bytes.
        pcie_generation, pcie_lanes: Of its connector.
        architecture: `turing`, `ampere`, `ada`, `hopper` or `blackwell`.
    """

    name: str
    memory_gib: int
    compute_capability: tuple[int, int]
    multiprocessors: int
    boost_mhz: int
    flops_per_clock: int
    memory_gb_per_second: int
    pcie_generation: int
    pcie_lanes: int
    architecture: str

    @property
    def is_laptop(self) -> bool:
        """Whether it is soldered into a laptop, with the limits of its cooling."""
        return self.name.endswith("Laptop GPU")

    @property
    def compute_type(self) -> str:
        """16-bit type that its tensor cores multiply at full speed."""
        return "bfloat16" if self.compute_capability >= (8, 0) else "float16"

    @property
    def peak_flops_per_second(self) -> float:
        """Arithmetic limit with float32 sums: SMs x operations per clock x boost clock."""
        return self.multiprocessors * self.flops_per_clock * self.boost_mhz * 1e6

    @property
    def copy_engines(self) -> int:
        """Copies at the same time; one where nothing better is known."""
        return 2 if any(part in self.name for part in _TWO_COPY_ENGINES) else 1


# By GiB: what many people have of that size, the slower ones of them.
_COMMON_CARDS = {
    4: "RTX 3050 Laptop",
    6: "RTX 4050 Laptop",
    8: "RTX 4060",
    10: "RTX 3080",
    12: "RTX 3060",
    16: "RTX 4060 Ti 16GB",
    24: "RTX 3090",
    32: "RTX 5090",
    40: "A100-SXM4-40GB",
    80: "H100 80GB HBM3",
}

_NEAR_NAMES = 4
# "A100" and "4060" tell a card; "8" and "TI" are in many names.
_TELLING_CHARACTERS = 3

CARDS = (
    Card("GeForce RTX 2060", 6, (7, 5), 30, 1680, 512, 336, 3, 16, "turing"),
    Card("GeForce RTX 2060 12GB", 12, (7, 5), 34, 1650, 512, 336, 3, 16, "turing"),
    Card("GeForce RTX 2060 SUPER", 8, (7, 5), 34, 1650, 512, 448, 3, 16, "turing"),
    Card("GeForce RTX 2070", 8, (7, 5), 36, 1620, 512, 448, 3, 16, "turing"),
    Card("GeForce RTX 2070 SUPER", 8, (7, 5), 40, 1770, 512, 448, 3, 16, "turing"),
    Card("GeForce RTX 2080", 8, (7, 5), 46, 1710, 512, 448, 3, 16, "turing"),
    Card("GeForce RTX 2080 SUPER", 8, (7, 5), 48, 1815, 512, 496, 3, 16, "turing"),
    Card("GeForce RTX 2080 Ti", 11, (7, 5), 68, 1545, 512, 616, 3, 16, "turing"),
    Card("GeForce RTX 3050 6GB", 6, (8, 6), 18, 1470, 512, 168, 4, 8, "ampere"),
    Card("GeForce RTX 3050", 8, (8, 6), 20, 1777, 512, 224, 4, 8, "ampere"),
    Card("GeForce RTX 3060 8GB", 8, (8, 6), 28, 1777, 512, 240, 4, 16, "ampere"),
    Card("GeForce RTX 3060", 12, (8, 6), 28, 1777, 512, 360, 4, 16, "ampere"),
    Card("GeForce RTX 3060 Ti", 8, (8, 6), 38, 1665, 512, 448, 4, 16, "ampere"),
    Card("GeForce RTX 3070", 8, (8, 6), 46, 1725, 512, 448, 4, 16, "ampere"),
    Card("GeForce RTX 3070 Ti", 8, (8, 6), 48, 1770, 512, 608, 4, 16, "ampere"),
    Card("GeForce RTX 3080", 10, (8, 6), 68, 1710, 512, 760, 4, 16, "ampere"),
    Card("GeForce RTX 3080 12GB", 12, (8, 6), 70, 1710, 512, 912, 4, 16, "ampere"),
    Card("GeForce RTX 3080 Ti", 12, (8, 6), 80, 1665, 512, 912, 4, 16, "ampere"),
    Card("GeForce RTX 3090", 24, (8, 6), 82, 1695, 512, 936, 4, 16, "ampere"),
    Card("GeForce RTX 3090 Ti", 24, (8, 6), 84, 1860, 512, 1008, 4, 16, "ampere"),
    Card("GeForce RTX 4060", 8, (8, 9), 24, 2460, 512, 272, 4, 8, "ada"),
    Card("GeForce RTX 4060 Ti", 8, (8, 9), 34, 2535, 512, 288, 4, 8, "ada"),
    Card("GeForce RTX 4060 Ti 16GB", 16, (8, 9), 34, 2535, 512, 288, 4, 8, "ada"),
    Card("GeForce RTX 4070", 12, (8, 9), 46, 2475, 512, 504, 4, 16, "ada"),
    Card("GeForce RTX 4070 SUPER", 12, (8, 9), 56, 2475, 512, 504, 4, 16, "ada"),
    Card("GeForce RTX 4070 Ti", 12, (8, 9), 60, 2610, 512, 504, 4, 16, "ada"),
    Card("GeForce RTX 4070 Ti SUPER", 16, (8, 9), 66, 2610, 512, 672, 4, 16, "ada"),
    Card("GeForce RTX 4080", 16, (8, 9), 76, 2505, 512, 717, 4, 16, "ada"),
    Card("GeForce RTX 4080 SUPER", 16, (8, 9), 80, 2550, 512, 736, 4, 16, "ada"),
    Card("GeForce RTX 4090", 24, (8, 9), 128, 2520, 512, 1008, 4, 16, "ada"),
    Card("GeForce RTX 5050", 8, (12, 0), 20, 2572, 512, 320, 5, 8, "blackwell"),
    Card("GeForce RTX 5060", 8, (12, 0), 30, 2497, 512, 448, 5, 8, "blackwell"),
    Card("GeForce RTX 5060 Ti", 8, (12, 0), 36, 2572, 512, 448, 5, 8, "blackwell"),
    Card("GeForce RTX 5060 Ti 16GB", 16, (12, 0), 36, 2572, 512, 448, 5, 8, "blackwell"),
    Card("GeForce RTX 5070", 12, (12, 0), 48, 2512, 512, 672, 5, 16, "blackwell"),
    Card("GeForce RTX 5070 Ti", 16, (12, 0), 70, 2452, 512, 896, 5, 16, "blackwell"),
    Card("GeForce RTX 5080", 16, (12, 0), 84, 2617, 512, 960, 5, 16, "blackwell"),
    Card("GeForce RTX 5090", 32, (12, 0), 170, 2407, 512, 1792, 5, 16, "blackwell"),
    Card("GeForce RTX 3050 Laptop GPU", 4, (8, 6), 16, 1740, 512, 192, 4, 8, "ampere"),
    Card("GeForce RTX 3060 Laptop GPU", 6, (8, 6), 30, 1703, 512, 336, 4, 16, "ampere"),
    Card("GeForce RTX 3070 Laptop GPU", 8, (8, 6), 40, 1620, 512, 448, 4, 16, "ampere"),
    Card("GeForce RTX 3070 Ti Laptop GPU", 8, (8, 6), 46, 1485, 512, 448, 4, 16, "ampere"),
    Card("GeForce RTX 3080 Laptop GPU", 8, (8, 6), 48, 1710, 512, 448, 4, 16, "ampere"),
    Card("GeForce RTX 4050 Laptop GPU", 6, (8, 9), 20, 2370, 512, 192, 4, 8, "ada"),
    Card("GeForce RTX 4060 Laptop GPU", 8, (8, 9), 24, 2370, 512, 256, 4, 8, "ada"),
    Card("GeForce RTX 4070 Laptop GPU", 8, (8, 9), 36, 2175, 512, 256, 4, 8, "ada"),
    Card("GeForce RTX 4080 Laptop GPU", 12, (8, 9), 58, 2280, 512, 432, 4, 16, "ada"),
    Card("GeForce RTX 4090 Laptop GPU", 16, (8, 9), 76, 2040, 512, 576, 4, 16, "ada"),
    Card("GeForce RTX 5050 Laptop GPU", 8, (12, 0), 20, 2662, 512, 384, 5, 8, "blackwell"),
    Card("GeForce RTX 5060 Laptop GPU", 8, (12, 0), 26, 2497, 512, 384, 5, 8, "blackwell"),
    Card("GeForce RTX 5070 Laptop GPU", 8, (12, 0), 36, 2347, 512, 384, 5, 8, "blackwell"),
    Card("GeForce RTX 5070 Ti Laptop GPU", 12, (12, 0), 46, 2220, 512, 672, 5, 16, "blackwell"),
    Card("GeForce RTX 5080 Laptop GPU", 16, (12, 0), 60, 2287, 512, 896, 5, 16, "blackwell"),
    Card("GeForce RTX 5090 Laptop GPU", 24, (12, 0), 82, 2160, 512, 896, 5, 16, "blackwell"),
    Card("Tesla T4", 16, (7, 5), 40, 1590, 1024, 320, 3, 16, "turing"),
    Card("RTX A2000 12GB", 12, (8, 6), 26, 1200, 1024, 288, 4, 16, "ampere"),
    Card("RTX A4000", 16, (8, 6), 48, 1560, 1024, 448, 4, 16, "ampere"),
    Card("A10", 24, (8, 6), 72, 1695, 1024, 600, 4, 16, "ampere"),
    Card("L4", 24, (8, 9), 58, 2040, 1024, 300, 4, 16, "ada"),
    Card("A100-SXM4-40GB", 40, (8, 0), 108, 1410, 2048, 1555, 4, 16, "ampere"),
    Card("H100 80GB HBM3", 80, (9, 0), 132, 1830, 4096, 3350, 5, 16, "hopper"),
)


def link_bytes_per_second(generation: int, lanes: int, *, is_laptop: bool = False) -> float:
    """What copies from pinned memory reach on a PCIe link."""
    known = PINNED_BYTES_PER_SECOND.get((generation, lanes))
    rate = known if known is not None else 0.75e9 * lanes * 2.0 ** (generation - 3)
    return rate * LAPTOP_LINK_RATIO if is_laptop else rate


def find_card(name: str) -> Card | None:
    """The card that people mean by `name`: `RTX 4060`, `4060 laptop`, `rtx3060 12gb`."""
    wanted = _key(name)
    by_key = {_key(card.name): card for card in CARDS}
    if wanted in by_key:
        return by_key[wanted]
    with_memory = {f"{_key(card.name)}{card.memory_gib}GB": card for card in CARDS}
    return with_memory.get(wanted)


def closest_names(name: str) -> list[str]:
    """Cards of the table that have all words of `name`, then those that are written like it."""
    by_key = {_key(card.name): card.name for card in CARDS}
    words = _words(name)
    holding = [key for key in by_key if all(word in key for word in words)]
    if not any(len(word) >= _TELLING_CHARACTERS for word in words):
        holding = []
    alike = difflib.get_close_matches(_key(name), by_key, n=_NEAR_NAMES, cutoff=0.5)
    return [by_key[key] for key in dict.fromkeys([*holding, *alike])][:_NEAR_NAMES]


def card_of_gpu(name: str, total_bytes: int) -> Card | None:
    """The table's card for the driver's name; of one name, that with the nearest memory."""
    wanted = _key(name)
    same = [
        card for card in CARDS if _key(card.name).removesuffix(f"{card.memory_gib}GB") == wanted
    ]
    same += [card for card in CARDS if _key(card.name) == wanted]
    if not same:
        return None
    nearest = min(same, key=lambda card: abs(card.memory_gib * GIB - total_bytes))
    # A name with quite another memory is a card that the table does not know.
    return nearest if abs(nearest.memory_gib * GIB - total_bytes) < 0.2 * total_bytes else None


def card_of_size(memory_bytes: int) -> Card:
    """A common card with about as much memory, whose rates stand for that size."""
    nearest = min(_COMMON_CARDS, key=lambda size: abs(size * GIB - memory_bytes))
    card = find_card(_COMMON_CARDS[nearest])
    assert card is not None, f"{_COMMON_CARDS[nearest]} is not in the table"
    return card


def _key(name: str) -> str:
    """`NVIDIA GeForce RTX 4060 Laptop GPU` and `rtx 4060 laptop` as one."""
    return "".join(_words(name)).removeprefix("RTX")


def _words(name: str) -> list[str]:
    text = name.upper().replace("-", " ").replace("_", " ").replace("GIB", "GB")
    drop = {"NVIDIA", "GEFORCE", "GPU", "DESKTOP", "RTX", "GTX", "TESLA"}
    return [word for word in text.replace("MOBILE", "LAPTOP").split() if word not in drop]
