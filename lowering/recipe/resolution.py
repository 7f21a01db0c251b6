"""What a policy decided for one matmul: for each of its three GEMMs a ``Gemm`` or a reason to leave it alone.

Plain data: the policy makes it at the front door, the passes read it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from quartet.lowering.recipe.types import ROLES, Gemm, Recipe, Saved

OPERANDS = {"fprop": {"x", "w"}, "dgrad": {"y", "w"}, "wgrad": {"y", "x"}}  # y: its gradient has the same mask


@dataclass(frozen=True)
class Choice:
    """The decision for one role.

    Args:
        gemm: what to do, or None to leave this product in the model's dtype.
        recipe: the recipe that ``gemm`` comes from; None where no recipe applies.
        reason: which part of the policy decided, in words.
        rule: index of the deciding rule in ``policy.rules``; None when it was the policy's default.
    """

    gemm: Gemm | None
    recipe: Recipe | None
    reason: str
    rule: int | None = None

    def detached(self, fprop: Choice) -> Choice:
        """A backward choice whose saved operand exists, or else starts from the original tensor."""
        gemm, recipe = self.gemm, self.recipe
        if gemm is None or recipe is None or gemm.b.source != "saved" or recipe.fprop == fprop.gemm:
            return self
        other = ("in high precision" if fprop.gemm is None or fprop.recipe is None else
                 f"quantised by {fprop.recipe.name!r}")
        return replace(self, gemm=replace(gemm, b=replace(gemm.b, source="original")),
                       reason=f"{self.reason}; operand b from the original tensor, because fprop is {other} and "
                              f"has no saved codes of {recipe.name!r}")


@dataclass(frozen=True)
class Resolution:
    """The decisions for the three GEMMs of one matmul."""

    fprop: Choice
    dgrad: Choice
    wgrad: Choice

    def choice(self, role: str) -> Choice:
        """The decision for ``"fprop"``, ``"dgrad"`` or ``"wgrad"``. Raises ValueError for another name."""
        if role not in ROLES:
            raise ValueError(f"a matmul has no role {role!r}; possible: {', '.join(ROLES)}")
        choice: Choice = getattr(self, role)
        return choice

    def recipe_for(self, role: str) -> Recipe | None:
        """The recipe in force for a role, or None."""
        return self.choice(role).recipe

    @property
    def quantizes(self) -> bool:
        return any(self.choice(role).gemm is not None for role in ROLES)

    def quantizes_unpriced(self, where_it_pays: bool) -> bool:
        """Whether it quantises a product that is to be rewritten for that, which has no price: under a policy that
        looks for what pays, only if a rule says so."""
        named = any(self.choice(role).rule is not None for role in ROLES)
        return self.quantizes and (named or not where_it_pays)

    def apart(self, masked: Set[str]) -> Resolution:
        """What of it keeps apart the tokens that a mask keeps apart.

        A block, a rotation or a scale along tokens lets each of them reach the results of the others. So a GEMM that
        contracts a masked matrix stays in the model's dtype, and one that makes such a matrix is quantised where the
        codes of a row of both operands depend on that row alone.

        Args:
            masked: which of ``"x"``, ``"w"`` and ``"y"`` (with its gradient) hold pairs of tokens under a mask.
        """
        if not masked:
            return self
        choices = {role: self.choice(role) for role in ROLES}
        for role, choice in choices.items():
            if (reason := self._mixes(role, masked)) is not None:
                choices[role] = replace(choice, gemm=None, reason=reason)
        fprop = choices["fprop"]
        return Resolution(fprop, choices["dgrad"].detached(fprop), choices["wgrad"].detached(fprop))

    def _mixes(self, role: str, masked: Set[str]) -> str | None:
        """How a GEMM would let masked tokens through; None where it does not."""
        gemm = self.choice(role).gemm
        if gemm is None or gemm.a.spec is None or gemm.b.spec is None:
            return None
        if masked & OPERANDS[role]:
            return ("contracts tokens under a mask: blocks, rotations and scales along tokens would let those that are "
                    "masked into the results of the others")
        if gemm.outer is not None:
            return "a rotation along the tokens of masked products would let those that are masked into the others"
        wide = next((spec for spec in (gemm.a.spec, gemm.b.spec) if not spec.row_local), None)
        return None if wide is None else (
            f"'{wide}' shares a scale among tokens, of which a mask keeps some apart; use a recipe with scales within "
            "a row, such as 'mxfp8' or 'fp8-rowwise'")

    @property
    def effective(self) -> Recipe:
        """The three decisions as one recipe.

        It is named after the recipes that took part (``"quartet+bf16"``, ``"none"`` without any); what else a recipe
        says is that of fprop's, or else of the first that applies; ``skip`` is empty, because the policy has already
        been asked.
        """
        taking_part = list(dict.fromkeys(r for r in map(self.recipe_for, ROLES) if r is not None))
        lead = taking_part[0] if taking_part else Recipe("none")
        return replace(
            lead, name="+".join(dict.fromkeys(r.name for r in taking_part)) or "none", fprop=self.fprop.gemm,
            dgrad=self.dgrad.gemm, wgrad=self.wgrad.gemm, skip=(), saved=None)

    @property
    def reason(self) -> str:
        """The three reasons in one line: one alone if they agree, otherwise each after its role."""
        reasons = [self.choice(role).reason for role in ROLES]
        if len(set(reasons)) == 1:
            return reasons[0]
        return "; ".join(f"{role}: {reason}" for role, reason in zip(ROLES, reasons, strict=True))


@dataclass(frozen=True)
class SavedChoice:
    """The decision for what a module leaves for backward beside the operands of its products.

    Args:
        saved: the format, or None to leave it exact.
        reason: which part of the policy decided, in words.
        rule: index of the deciding rule in ``policy.rules``; None when it was the policy's default.
    """

    saved: Saved | None
    reason: str
    rule: int | None = None
