"""Writes a recipe as an XMP packet (ISO 16684-1), for photo libraries, archives and search.

The prompt is `dc:description`, the program `xmp:CreatorTool`, and IPTC's `DigitalSourceType` says
that a trained model made the picture. Everything else is a property in imagemill's own namespace.
XMP is for other programs: imagemill itself reads its JSON.
"""

import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

NAMESPACE = "urn:imagemill:recipe:"
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

LONGEST_TEXT = 24_000
"""Most bytes per property, so a packet with two prompts fits in one segment of a JPEG."""

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:imagemill="{namespace}">
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{prompt}</rdf:li></rdf:Alt></dc:description>
<xmp:CreatorTool>{tool}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
{properties}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def packet(facts: Mapping[str, Any]) -> bytes:
    """Return the packet for a recipe's facts: `prompt`, `versions` and others that aren't None."""
    versions: Mapping[str, str] = facts["versions"]
    others = {key: value for key, value in facts.items() if value is not None and key != "prompt"}
    text = _PACKET.format(
        namespace=NAMESPACE,
        prompt=_text(facts["prompt"]),
        tool=_text(f"imagemill {versions['imagemill']}"),
        source=MADE_BY_A_MODEL,
        properties="\n".join(_property(key, value) for key, value in others.items()),
    )
    return text.encode()


def _property(name: str, value: Any) -> str:
    tag = f"imagemill:{name}"
    if isinstance(value, Mapping):
        inside = "".join(_property(key, item) for key, item in value.items())
        return f'<{tag} rdf:parseType="Resource">{inside}</{tag}>'
    if isinstance(value, list):
        items = "".join(f"<rdf:li>{_text(str(item))}</rdf:li>" for item in value)
        return f"<{tag}><rdf:Bag>{items}</rdf:Bag></{tag}>"
    text = (
        str(value) if not isinstance(value, bool) else str(value).capitalize()
    )  # as XMP spells it
    return f"<{tag}>{_text(text)}</{tag}>"


def _text(text: str) -> str:
    """Escape text for XML, and cut it if it's too long for a packet."""
    escaped = escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})
    if len(escaped.encode()) <= LONGEST_TEXT:
        return escaped
    cut = escaped.encode()[:LONGEST_TEXT].decode(errors="ignore")
    return cut[: cut.rfind("&")] + "…" if "&" in cut[-8:] else cut + "…"
