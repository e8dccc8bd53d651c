"""A recipe as an XMP packet (ISO 16684-1): what photo libraries, archives and search read.

The prompt is `dc:description`, the program `xmp:CreatorTool`, and IPTC's `DigitalSourceType` says
that a trained model made the picture. Everything else stands in a namespace of imagemill's own, a
property a fact. XMP is for other people's programs: imagemill reads its own JSON. Knows no picture
and no file format.
"""

import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

NAMESPACE = "urn:imagemill:recipe:"
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

LONGEST_TEXT = 24_000
"""Bytes of a property at most: a packet with two prompts must fit into one segment of a JPEG."""

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
    """The packet of a recipe's facts: `prompt`, `versions` and whatever else is not None."""
    versions: Mapping[str, str] = facts["versions"]
    others = {name: one for name, one in facts.items() if one is not None and name != "prompt"}
    text = _PACKET.format(
        namespace=NAMESPACE,
        prompt=_text(facts["prompt"]),
        tool=_text(f"imagemill {versions['imagemill']}"),
        source=MADE_BY_A_MODEL,
        properties="\n".join(_property(name, one) for name, one in others.items()),
    )
    return text.encode()


def _property(name: str, value: Any) -> str:
    tag = f"imagemill:{name}"
    if isinstance(value, Mapping):
        inside = "".join(_property(key, one) for key, one in value.items())
        return f'<{tag} rdf:parseType="Resource">{inside}</{tag}>'
    said = str(value) if not isinstance(value, bool) else str(value).capitalize()  # XMP's own way
    return f"<{tag}>{_text(said)}</{tag}>"


def _text(text: str) -> str:
    """Text as XML may hold it, cut where it is too long for a packet."""
    shown = escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})
    if len(shown.encode()) <= LONGEST_TEXT:
        return shown
    cut = shown.encode()[:LONGEST_TEXT].decode(errors="ignore")
    return cut[: cut.rfind("&")] + "…" if "&" in cut[-8:] else cut + "…"
