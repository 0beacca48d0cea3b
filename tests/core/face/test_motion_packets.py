"""Packets of Live Link Face and VMC: what they mean, and that malformed, late, huge and missing ones do no harm."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from fuzz import mutate
from live_link import live_link

from export3d_cli.core.animation.live import LiveTracker
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion_packets import (
    RESTART_FRAMES,
    FacePacket,
    LiveLinkDecoder,
    PacketTracker,
    VmcDecoder,
    VmcSender,
    open_packets,
)
from export3d_cli.core.runtime.camera import rotation_exp, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError


def vmc(*messages: tuple[object, ...]) -> bytes:
    osc_bundle_builder = pytest.importorskip("pythonosc.osc_bundle_builder")
    from pythonosc.osc_message_builder import OscMessageBuilder

    bundle = osc_bundle_builder.OscBundleBuilder(osc_bundle_builder.IMMEDIATELY)
    for address, *arguments in messages:
        message = OscMessageBuilder(address=str(address))
        for argument in arguments:
            message.add_arg(argument)
        bundle.add_content(message.build())
    return bytes(bundle.build().dgram)


def vmc_face(jaw: float = 0.5) -> bytes:
    half = 0.2  # half of the angle
    pose = (0.0, 1.5, 0.0, 0.0, -float(np.sin(half)), 0.0, float(np.cos(half)))  # to the person's left
    return vmc(
        ("/VMC/Ext/Blend/Val", "JawOpen", jaw), ("/VMC/Ext/Blend/Val", "Joy", 1.0),
        ("/VMC/Ext/Bone/Pos", "Head", *pose), ("/VMC/Ext/Blend/Apply",),
    )  # fmt: skip


def yaw(packet: FacePacket) -> float:
    """Return the yaw in radians: positive to the image's right."""
    camera = PacketTracker().make_motion([packet], Fraction(60), (1, 1)).camera[0]
    return float(np.radians(yaw_pitch_roll(camera)[0]))


def test_live_link_packet_gives_coefficients_and_head() -> None:
    packet = LiveLinkDecoder()(live_link(_17=0.4, _23=1.5, _52=0.3))
    assert packet is not None
    expected = dict.fromkeys(ARKIT_NAMES, 0.0) | {"jawOpen": 0.4, "mouthSmileLeft": 1.0}
    np.testing.assert_allclose(packet.coefficients, list(expected.values()), atol=1e-6)
    assert yaw(packet) == pytest.approx(0.3, abs=1e-5)


def test_vmc_packet_gives_coefficients_and_head() -> None:
    packet = VmcDecoder()(vmc_face(0.5))
    assert packet is not None
    assert packet.coefficients[ARKIT_NAMES.index("jawOpen")] == 0.5
    assert packet.coefficients.sum() == 0.5
    assert yaw(packet) == pytest.approx(0.4, abs=1e-5)


def test_late_packets_are_ignored_until_the_sender_begins_again() -> None:
    decode = LiveLinkDecoder()
    frames = [1000, 1001, 999, 1001, 1001 - RESTART_FRAMES, 402]
    assert [decode(live_link(frame)) is not None for frame in frames] == [True, True, False, True, True, True]
    assert decode(live_link(403)[:-4] + b"\x7f\xa0\0\1") is None  # a signalling NaN


@pytest.mark.parametrize(
    ("decoder", "packets"),
    [
        (LiveLinkDecoder, [live_link]),
        (
            VmcDecoder,
            [vmc_face, lambda: vmc(*[("/VMC/Ext/Blend/Val", "JawOpen", 9.0)] * 900, ("/VMC/Ext/Blend/Apply",))],
        ),
    ],
)
def test_mutated_packets_are_ignored_or_give_a_finite_face(
    decoder: Callable[[], Callable[[bytes], FacePacket | None]], packets: list[Callable[[], bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rng, decode, seeds = random.Random(4), decoder(), [make() for make in packets]
    nested = b"#bundle\0" + bytes(8)
    decode((nested + struct.pack(">I", 60000)) * 3000)  # bundles in bundles
    for _ in range(300):
        packet = decode(mutate(rng.choice(seeds), rng))
        if packet is not None:
            assert np.isfinite(packet.rotation).all()
            np.testing.assert_allclose(packet.rotation @ packet.rotation.T, np.eye(3), atol=1e-6)
            assert packet.coefficients.min() >= 0
            assert packet.coefficients.max() <= 1
    assert not caplog.records  # a sender cannot fill the terminal


def test_sent_motion_is_received_by_vmc_unchanged() -> None:
    pytest.importorskip("pythonosc")
    rng, stopped = np.random.default_rng(2), threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    packets = open_packets(f"vmc:{port}", "127.0.0.1", stopped)
    send = VmcSender(f"osc://localhost:{port}")
    for turn in ([0.0, 0.0, 0.0], [0.2, -0.7, 0.1], [1.2, 1.5, -1.0]):
        face = FacePacket(rng.random(52), rotation_exp(np.array(turn)))
        motion = PacketTracker().make_motion([face], Fraction(60), (1, 1))
        send(motion)
        received = next(packet for packet, _ in packets if packet is not None)
        np.testing.assert_allclose(received.coefficients, motion.beta[0, :52], atol=1e-6)
        np.testing.assert_allclose(received.rotation, face.rotation, atol=1e-6)
    stopped.set()
    assert list(packets) == []
    send(PacketTracker().make_motion([face], Fraction(60), (1, 1)))  # nothing receives it
    send.close()


def test_sent_packets_are_smaller_than_those_of_networks() -> None:
    pytest.importorskip("pythonosc")
    packet = FacePacket(np.ones(52), np.eye(3))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with contextlib.closing(VmcSender(f"osc://127.0.0.1:{receiver.getsockname()[1]}")) as send:
            send(PacketTracker().make_motion([packet], Fraction(60), (1, 1)))
        receiver.settimeout(1)
        sent = [receiver.recv(65535) for _ in range(3)]
    assert max(map(len, sent)) < 1472
    assert b"/VMC/Ext/Blend/Val\0\0,sf\0BrowDownLeft\0" in b"".join(sent)
    assert [b"/VMC/Ext/Blend/Apply" in data for data in sent] == [False] * (len(sent) - 1) + [True]


@pytest.mark.parametrize(
    "address", ["127.0.0.1:39539", "osc://127.0.0.1", "osc://127.0.0.1:99999", "osc://no.invalid:1"]
)
def test_addresses_that_cannot_be_sent_to_are_one_clear_error(address: str) -> None:
    pytest.importorskip("pythonosc")
    with pytest.raises(InputError, match=r"use osc://127\.0\.0\.1:39539|choose another address"):
        VmcSender(address)


def test_socket_passes_good_packets_on_and_reports_silence_under_a_flood() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        port = sender.getsockname()[1] + 1
        stopped = threading.Event()
        packets = open_packets(f"livelink:{port}", "127.0.0.1", stopped)
        assert next(packets)[0] is None
        for _ in range(2000):  # more than the system keeps
            sender.sendto(bytes(60000), ("127.0.0.1", port))
        began = time.monotonic()
        assert next(packets)[0] is None
        assert time.monotonic() - began < 10
        sender.sendto(live_link(_17=0.25), ("127.0.0.1", port))
        packet = next(packet for packet, _ in packets if packet is not None)
        assert packet.coefficients.sum() == 0.25
        with pytest.raises(InputError, match=f"UDP port {port} of 127.0.0.1 cannot be opened"):
            open_packets(f"vmc:{port}", "127.0.0.1", stopped)
        stopped.set()
        assert list(packets) == []


@pytest.mark.parametrize("name", ["livelink:", "osc", "livelink:123456", "vmc:x", "http://x"])
def test_unknown_protocols_are_one_clear_error(name: str) -> None:
    with pytest.raises(InputError, match="use livelink, vmc"):
        open_packets(name, "127.0.0.1", threading.Event())


def test_live_tracker_calibrates_on_packets_and_settles_without_them() -> None:
    tracker, decode = LiveTracker(PacketTracker(), Fraction(60), "off"), LiveLinkDecoder()
    calibrating = [tracker(decode(live_link(k, _17=0.1)), 0.1 * k) for k in range(22)]
    assert [calibrating[0].state, calibrating[-1].state] == ["calibrating", "live"]
    live = [tracker(decode(live_link(30 + k, _17=0.6, _52=0.2)), 2.2 + 0.1 * k) for k in range(10)][-1]
    assert live.strength == 1
    assert live.motion is not None
    assert live.reference is not None
    jaw = ARKIT_NAMES.index("jawOpen")
    assert live.motion.beta[0, jaw] - live.reference.beta[0, jaw] == pytest.approx(0.5, abs=0.02)
    lost = [tracker(None, 3.2 + 0.1 * k) for k in range(10)][-1]
    assert (lost.state, lost.strength) == ("no face", 0)
