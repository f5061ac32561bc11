"""Claims of a lab, and the controls that must fail: without them a lab proves nothing."""


class Claims:
    """The claims and controls of one run, in their order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.broken = 0

    def claim(self, text: str, holds: bool) -> None:
        """Record whether the cure works: `text` is a sentence with the measured figures."""
        self._record("claim held", "CLAIM BROKEN", text, holds)

    def control(self, text: str, fails: bool) -> None:
        """Record whether the same measurement fails without the cure, as it must."""
        self._record("control failed as it must", "CONTROL DID NOT FAIL", text, fails)

    def _record(self, good: str, bad: str, text: str, is_good: bool) -> None:
        self.broken += not is_good
        self.lines.append(f"{good if is_good else bad}: {text}")

    @property
    def hold(self) -> bool:
        """Whether there is a claim and a control, and each is as it must be."""
        has_both = any(line.startswith("claim") for line in self.lines)
        return has_both and any("control" in line for line in self.lines) and not self.broken

    @property
    def text(self) -> str:
        """One line for each."""
        return "\n".join(self.lines)
