"""Which dense model teaches a student, and whether it can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.model.context import refuse_longer_windows
from pgprune_cli.model.loading import load_tokenizer, read_config
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.run.base import find_base
from pgprune_cli.run.decision import kept_layers, read_origin, refuse_other_base
from pgprune_cli.run.layout import DECISION_RECORD

OPTION = "--teacher"


def find_teacher(student: Source, given: str | None = None) -> Source:
    """Return the files of the dense model: `given`, or the model that the student was pruned from.

    Raises:
        UserError: it is not known, not there, not the model that was searched (unless it is given), or the student
            itself.
    """
    teacher = _base_of(student) if given is None else resolve(given)
    if _files(teacher) == _files(student):
        raise UserError(
            f"{teacher.name}: is the model to recover itself. Give the dense model that it "
            f"was pruned from with {OPTION}."
        )
    return teacher


def _base_of(student: Source) -> Source:
    origin = read_origin(student.directory)
    if origin is None:
        raise UserError(
            f"{student.name}: has no {DECISION_RECORD} that says which dense model it was pruned from. Give that model "
            f"with {OPTION}."
        )
    teacher = find_base(origin, student.directory, option=OPTION)
    refuse_other_base(teacher, origin, student.directory / DECISION_RECORD)
    return teacher


def _files(source: Source) -> tuple[Path, str | None]:
    return source.directory.resolve(), source.gguf


@dataclass(frozen=True)
class Pair:
    """A student and a teacher that fits it. config: of the student; tokenizer: of the student, which makes the text;
    vocabulary: of the teacher; streams: see `streams_to_match`, empty unless hidden states are compared."""

    config: Any
    tokenizer: Any
    vocabulary: int
    streams: Sequence[int]


def check_pair(student: Source, teacher: Source, settings: RecoverSettings) -> Pair:
    """Return what a training needs to know of the two models. Reads configs and tokenizers only.

    Raises UserError if the teacher cannot teach the student with these settings.
    """
    config, theirs = read_config(student), read_config(teacher)
    tokenizer = load_tokenizer(student)
    refuse_other_vocabulary(student, config, tokenizer, teacher, theirs, load_tokenizer(teacher))
    refuse_longer_windows(theirs, teacher.name, {"recover.seqlen": settings.seqlen})
    streams = streams_to_match(student, config, teacher, theirs) if settings.hidden else ()
    return Pair(config, tokenizer, theirs.vocab_size, streams)


def refuse_other_vocabulary(
    student: Source, student_config: Any, student_tokenizer: Any, teacher: Source, config: Any, tokenizer: Any
) -> None:
    """Raise UserError unless a token's id means the same to both models.

    config, tokenizer: of the teacher. Tokens that only one of the tokenizers has do not matter: the student's makes the
    text, and rows of the vocabulary without a token are never likely.
    """
    advice = f"Give the model that {student.name} was pruned from, or one with the same tokenizer, with {OPTION}."
    if student_config.vocab_size != config.vocab_size:
        raise UserError(
            f"{teacher.name}: has {config.vocab_size:,} tokens in its vocabulary, but {student.name} has "
            f"{student_config.vocab_size:,}. {advice}"
        )
    ours, theirs = ({id: token for token, id in each.get_vocab().items()} for each in (student_tokenizer, tokenizer))
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise UserError(f"{teacher.name}: its tokenizer shares no token id with that of {student.name}. {advice}")
    if different := [id for id in shared if ours[id] != theirs[id]]:
        first = different[0]
        raise UserError(
            f"{teacher.name}: its tokenizer gives another meaning to {len(different):,} of the {len(shared):,} token "
            f"ids of {student.name}, such as {first} ({theirs[first]!r}, not {ours[first]!r}). {advice}"
        )


def streams_to_match(student: Source, student_config: Any, teacher: Source, config: Any) -> list[int]:
    """Return for every layer of the student the layer of the teacher behind which its residual stream should be equal.

    Layers that the decision removed as a whole are skipped: what the student's layer hands on is compared with what the
    teacher's next kept layer reads, or behind its last layer.

    Raises:
        UserError: the models' hidden sizes differ, or it is not known which layers correspond.
    """
    if student_config.hidden_size != config.hidden_size:
        raise UserError(
            f"recover.hidden: the residual stream of {teacher.name} has {config.hidden_size:,} channels, but that of "
            f"{student.name} has {student_config.hidden_size:,}. Set recover.hidden to 0."
        )
    layers, theirs = student_config.num_hidden_layers, config.num_hidden_layers
    if layers == theirs:
        return list(range(layers))
    kept, decided = kept_layers(student.directory) or ([], 0)
    if (len(kept), decided) != (layers, theirs):
        raise UserError(
            f"recover.hidden: {student.name} has {layers} layers and {teacher.name} has {theirs}, and "
            f"{DECISION_RECORD} does not say which of them correspond. Set recover.hidden to 0."
        )
    return [following - 1 for following in (*kept[1:], theirs)]
