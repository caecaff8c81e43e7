"""JSON without surprises: duplicate keys, NaN, infinities and deep nesting are errors."""

import json
import math
import re
from collections import Counter
from typing import Any

from jlora.errors import CorruptError

MAX_JSON_BYTES = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns the parsed document; `where` names it in messages.

    Raises:
        CorruptError: too large, not UTF-8, not JSON, duplicate keys, NaN or infinity.
    """
    if len(data) > max_bytes:
        raise CorruptError(
            f"{where}: {len(data):,} bytes of JSON; at most {max_bytes:,} are read"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            double = next(key for key, count in counts.items() if count > 1)
            raise CorruptError(f"{where}: the key {double!r:.200} occurs twice")
        return result

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise CorruptError(f"{where}: the number {text} is not finite")
        return value

    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
        if _SURROGATE.search(data):  # half of a character cannot be written again
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except UnicodeEncodeError as error:
        raise CorruptError(f"{where}: a text holds half of a character") from error
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where}: not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise CorruptError(
            f"{where}, line {error.lineno}, column {error.colno}: not JSON, {error.msg}"
        ) from error
    except RecursionError as error:
        raise CorruptError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise CorruptError(f"{where}: {error}") from error


def parse_json_object(
    data: bytes, where: str, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Returns the parsed document, which must be an object.

    Raises:
        CorruptError: as `parse_json`, or the document is not an object.
    """
    document = parse_json(data, where, max_bytes)
    if not isinstance(document, dict):
        raise CorruptError(
            f"{where}: expected a JSON object, found {type(document).__name__}"
        )
    return document
