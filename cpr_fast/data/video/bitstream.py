"""Reads from packets of MPEG-4, H.264 and HEVC streams whether decoding can start at them."""

from __future__ import annotations

from collections.abc import Iterator

import av

PICTURE = b"\x00\x00\x01\xb6"  # start code of a picture of an MPEG-4 stream; the next two bits are the kind of picture
ENCODER = b"\x00\x00\x01\xb2"  # start code of the encoder's name; FFmpeg works around known encoder faults
INTRA, BIDIRECTIONAL = 0, 2  # kinds of MPEG-4 pictures
UNIT = b"\x00\x00\x01"  # start code of a NAL unit of H.264 or HEVC outside MP4
INTRA_SLICES = (2, 4, 7, 9)  # slice types I and SI


def is_intra(packet: av.Packet, decoder: av.VideoCodecContext) -> bool:
    """Returns whether decoding can start at a packet that is marked as a key packet.

    Containers and FFmpeg also mark packets at which decoding cannot start: the recovery points of H.264's periodic
    intra refresh, or every packet of an MP4 file without a table of key frames.
    """
    if decoder.name == "mpeg4":
        data = bytes(packet)
        first = data.find(PICTURE)
        return 0 <= first < len(data) - 4 and data[first + 4] >> 6 == INTRA
    if decoder.name not in ("h264", "hevc"):
        return True
    for unit in _units(bytes(packet), decoder.name, decoder.extradata or b""):
        if decoder.name == "hevc":
            kind = unit[0] >> 1 & 63
            if kind < 32:
                return 16 <= kind <= 23
        elif unit[0] & 31 in (1, 5) and _slice_kind(unit) not in INTRA_SLICES:
            return False
    return True


def is_reference(packet: av.Packet, decoder: av.VideoCodecContext) -> bool:
    """Returns whether other frames may refer to the frame of a packet of H.264 (nal_ref_idc of ITU-T H.264, 7.4.1)."""
    units = _units(bytes(packet), "h264", decoder.extradata or b"")
    return any(unit[0] >> 5 & 3 for unit in units if unit[0] & 31 in (1, 5))


def _units(data: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """Yields the first bytes of every NAL unit of a packet of H.264 or HEVC."""
    if extradata[:1] == b"\x01":  # as stored in MP4: each unit follows its length
        size, place = 1 + (extradata[4 if codec == "h264" else 21] & 3), 0
        while place + size < len(data):
            start = place + size
            place = start + int.from_bytes(data[place:start], "big")
            if place > start:
                yield data[start : min(place, start + 16)]
        return
    place = data.find(UNIT)
    while 0 <= place < len(data) - 3:
        yield data[place + 3 : place + 19]
        place = data.find(UNIT, place + 3)


def _slice_kind(unit: bytes) -> int:
    """Returns slice_type of H.264, the second Exp-Golomb number of a slice header; -1 if the bytes end before it."""
    bits = int.from_bytes(unit[1:].replace(b"\0\0\3", b"\0\0").ljust(16, b"\0")[:16], "big")
    place, value = 128, 0
    for _ in range(2):
        zeros = place - (bits & ((1 << place) - 1)).bit_length()
        place -= 2 * zeros + 1
        if place < 0:
            return -1
        value = (bits >> place & ((2 << zeros) - 1)) - 1
    return value
