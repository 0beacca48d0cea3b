"""Motion that programs send by UDP: Live Link Face (ARKit, an iPhone), and the VMC protocol (OSC), which is also sent.

Packets are untrusted: those that are malformed or late are ignored, and none is kept.
"""

import contextlib
import importlib.util
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from export3d_cli.core.face import arkit
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, rotation_exp, rotation_log, with_head_pose
from export3d_cli.core.runtime.errors import InputError

PORTS = {"livelink": 11111, "vmc": 39539}
PACKET_RATE = Fraction(60)  # packets/s of Live Link Face
SILENCE_S = 0.1  # time without a packet after which there is no face
MAX_DATAGRAM = 65535
BUNDLE_MESSAGES = 24  # of VMC in a packet, which then has less than 1500 bytes, as networks demand
RESTART_FRAMES = 600  # a frame number that is farther back comes from a sender that began again
_SIDES = ("Blink", "LookDown", "LookIn", "LookOut", "LookUp", "Squint", "Wide")
_LIVE_LINK_ORDER = [ARKIT_NAMES.index(name) for name in (
    *(f"eye{action}{side}" for side in ("Left", "Right") for action in _SIDES),
    "jawForward", "jawLeft", "jawRight", "jawOpen",
    "mouthClose", "mouthFunnel", "mouthPucker", "mouthLeft", "mouthRight",
    *(f"mouth{part}{side}" for part in ("Smile", "Frown", "Dimple", "Stretch") for side in ("Left", "Right")),
    "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper",
    *(f"mouth{part}{side}" for part in ("Press", "LowerDown", "UpperUp") for side in ("Left", "Right")),
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "noseSneerLeft", "noseSneerRight", "tongueOut",
)]  # fmt: skip


class FacePacket(NamedTuple):
    """A face as a packet describes it."""

    coefficients: np.ndarray  # (52,) in [0, 1], in the order of `ARKIT_NAMES`
    rotation: np.ndarray  # (3, 3), head to camera


class PacketTracker:
    """Takes the place of a face tracker: makes motion of packets, seen by a camera straight before the head."""

    def calibrate_clip(self, packets: Sequence[FacePacket], size: tuple[int, int], scale: float) -> None:
        """Return nothing: packets have no crop."""

    def make_motion(self, packets: Sequence[FacePacket], fps: Fraction, size: tuple[int, int], *,
                    clip: None = None) -> Motion:  # fmt: skip
        """Return the packets as a motion without landmarks."""
        cameras = np.repeat(orbit_camera(0, 0)[None], len(packets), axis=0)
        cameras = with_head_pose(cameras, np.stack([p.rotation for p in packets]), head_pose(cameras)[1])
        return arkit.make_motion(np.stack([p.coefficients for p in packets]), cameras, fps)


def open_packets(protocol: str, host: str, stopped: threading.Event) -> Iterator[tuple[FacePacket | None, float]]:
    """Listen on `host` for `livelink[:PORT]` or `vmc[:PORT]`; yield packets with the time of their arrival.

    Without packets, None is yielded every `SILENCE_S`. Raises `InputError` for an unknown protocol or a used port.
    """
    match = re.fullmatch(r"(livelink|vmc)(?::(\d{1,5}))?", protocol, flags=re.ASCII)
    if match is None:
        raise InputError(f"motion cannot come from {protocol!r}: use livelink, vmc, or one of them with :PORT")
    if match[1] == "vmc":
        _check_osc()
    port = int(match[2] or PORTS[match[1]])
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        server.close()
        raise InputError(f"UDP port {port} of {host} cannot be opened ({error}): choose another one") from error
    return _receive(server, LiveLinkDecoder() if match[1] == "livelink" else VmcDecoder(), stopped)


def _check_osc() -> None:
    if importlib.util.find_spec("pythonosc") is None:
        raise InputError("VMC needs python-osc, which is not installed: run pip install 'export3d-cli[osc]'")


def _receive(server: socket.socket, decode: Callable[[bytes], FacePacket | None],
             stopped: threading.Event) -> Iterator[tuple[FacePacket | None, float]]:  # fmt: skip
    with server:
        server.settimeout(SILENCE_S)
        last = time.monotonic()
        while not stopped.is_set():
            try:
                packet = decode(server.recv(MAX_DATAGRAM))
            except OSError:  # nothing came, or the sender closed its port
                packet = None
            now = time.monotonic()
            if packet is not None or now - last > SILENCE_S:
                last = now
                yield packet, now


class LiveLinkDecoder:
    """Decodes the packets of Live Link Face: 61 big-endian floats at the end, before them the frame number."""

    def __init__(self) -> None:
        self._frame = -1

    def __call__(self, data: bytes) -> FacePacket | None:
        """Return the face of a packet, or None if it is malformed or older than the last one."""
        if len(data) < 306 or data[-245] != 61:  # the device, 37 bytes, and its name, the time, the count, 61 floats
            return None
        (frame,) = struct.unpack("!I", data[-261:-257])
        if 0 < self._frame - frame < RESTART_FRAMES:
            return None
        values = np.array(struct.unpack("!61f", data[-244:]))
        angles = values[52:55]
        if not (np.isfinite(values).all() and np.abs(angles).max() <= np.pi):
            return None
        self._frame = frame
        coefficients = np.zeros(len(ARKIT_NAMES))
        coefficients[_LIVE_LINK_ORDER] = values[:52].clip(0, 1)
        return FacePacket(coefficients, arkit.head_rotations(angles[None])[0])


def _is_not_of_pythonosc(record: logging.LogRecord) -> bool:
    return "pythonosc" not in record.pathname


class VmcDecoder:
    """Decodes VMC: coefficients by name, the bone `Head`, and `Apply`, which ends a frame; unknown names are ignored.

    Unity's axes are those of the head frame with all three reversed, so rotation matrices are equal in both.
    """

    def __init__(self) -> None:
        self._index = {name.lower(): number for number, name in enumerate(ARKIT_NAMES)}
        self._coefficients, self._rotation = np.zeros(len(ARKIT_NAMES)), np.eye(3)
        logging.getLogger().addFilter(_is_not_of_pythonosc)  # it would print every malformed packet

    def __call__(self, data: bytes) -> FacePacket | None:
        """Return the face if a frame ends in this packet, else None."""
        from pythonosc.osc_packet import OscPacket

        try:
            messages = [timed.message for timed in OscPacket(data).messages]
        except Exception:  # malformed: the library raises many kinds, RecursionError among them
            return None
        is_complete = False
        for message in messages:
            match message.address, message.params:
                case "/VMC/Ext/Blend/Val", [str(name), float(value)] if name.lower() in self._index:
                    if np.isfinite(value):
                        self._coefficients[self._index[name.lower()]] = min(max(value, 0.0), 1.0)
                case "/VMC/Ext/Bone/Pos", ["Head", float(), float(), float(), *quaternion] if len(quaternion) == 4:
                    self._turn(quaternion)
                case "/VMC/Ext/Blend/Apply", _:
                    is_complete = True
        return FacePacket(self._coefficients.copy(), self._rotation) if is_complete else None

    def _turn(self, quaternion: list[object]) -> None:
        """Take the rotation of a quaternion x, y, z, w, if it is one."""
        if all(isinstance(part, float) and abs(part) < 2 for part in quaternion):
            axis, w = np.array(quaternion[:3], float), float(str(quaternion[3]))
            sine = np.linalg.norm(axis)
            if 0.5 < np.hypot(sine, w) < 2:
                self._rotation = rotation_exp(axis / max(sine, 1e-9) * 2 * np.arctan2(sine, w))


class VmcSender:
    """Sends faces by VMC to `osc://HOST:PORT`; raises `InputError` for another address."""

    def __init__(self, address: str) -> None:
        match = re.fullmatch(r"osc://([\w.-]+):(\d{1,5})/?", address, flags=re.ASCII)
        if match is None:
            raise InputError(f"{address!r} is not an address to send to: use osc://127.0.0.1:{PORTS['vmc']}")
        _check_osc()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.connect((match[1], int(match[2])))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise InputError(f"{address} cannot be sent to ({error}): choose another address") from error

    def __call__(self, motion: Motion) -> None:
        """Send the first row of a motion: the bone `Head`, the 52 coefficients by ARKit's names, and `Apply`."""
        from pythonosc.osc_bundle_builder import IMMEDIATELY, OscBundleBuilder
        from pythonosc.osc_message_builder import build_msg

        turn = rotation_log(head_pose(motion.camera[0])[0])
        angle = np.linalg.norm(turn)
        quaternion = (*(np.sinc(angle / (2 * np.pi)) / 2 * turn).tolist(), float(np.cos(angle / 2)))  # x, y, z, w
        messages = [build_msg("/VMC/Ext/Bone/Pos", ["Head", 0.0, 0.0, 0.0, *quaternion])]
        for name, value in zip(ARKIT_NAMES, motion.beta[0].tolist(), strict=False):
            messages.append(build_msg("/VMC/Ext/Blend/Val", [name[0].upper() + name[1:], value]))
        messages.append(build_msg("/VMC/Ext/Blend/Apply", []))
        for start in range(0, len(messages), BUNDLE_MESSAGES):
            bundle = OscBundleBuilder(IMMEDIATELY)
            for message in messages[start : start + BUNDLE_MESSAGES]:
                bundle.add_content(message)
            with contextlib.suppress(OSError):  # nothing receives it
                self._socket.send(bundle.build().dgram)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
