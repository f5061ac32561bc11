"""The instructions of a Dockerfile, stage by stage."""

import re
import shlex
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction, such as `USER 10001:10001`, with its lines joined."""

    name: str
    arguments: str


Stage = list[Instruction]


def parse_stages(text: str) -> list[Stage]:
    """Return the instructions before the first FROM, then those of each stage."""
    without_comments = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    joined = without_comments.replace("\\\n", " ")
    stages: list[Stage] = [[]]
    for name, arguments in re.findall(r"^\s*([A-Za-z]+)\s+(.*)$", joined, re.MULTILINE):
        if name.upper() == "FROM":
            stages.append([])
        stages[-1].append(Instruction(name.upper(), " ".join(arguments.split())))
    return stages


def last_arguments(stage: Stage, name: str) -> str:
    """Return the arguments of the last instruction of this name. Without one, return nothing."""
    for instruction in reversed(stage):
        if instruction.name == name:
            return instruction.arguments
    return ""


def environment(stage: Stage) -> dict[str, str]:
    """Return the variables that ENV instructions set."""
    variables = {}
    for instruction in stage:
        if instruction.name == "ENV":
            for word in shlex.split(instruction.arguments):
                name, has_value, value = word.partition("=")
                if has_value:
                    variables[name] = value
    return variables
