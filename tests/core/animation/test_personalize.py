"""Person files: how they are made and used, and which files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export3d_cli import __version__
from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import load_photo, read_portrait, write_look
from export3d_cli.core.animation.options import Look, PortraitOptions, ReenactOptions
from export3d_cli.core.animation.person import Person, fingerprint
from export3d_cli.core.animation.personalize import PersonalizeOptions, _cut_head, choose_frames, fit_basis, personalize
from export3d_cli.core.animation.reenact import load_portraits
from export3d_cli.core.face.face_track import find_photo_face
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path, file_sha256

SOURCE, DRIVE = example_path("source.jpg"), example_path("drive.mp4")


@pytest.fixture(scope="module")
def person_file(animator: Animator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("person") / "me.person.safetensors"
    options = PersonalizeOptions(video=DRIVE, duration=1.0, frames=2, force=True)
    summary = personalize(animator, SOURCE, out, options)
    assert summary.tracked == 25 or summary.tracked == 30
    assert summary.landmark_error is not None and summary.landmark_error[0] == round(summary.landmark_error[0], 2)
    assert len(summary.photos) == 3 and summary.photos[1].startswith("drive.mp4 at ")
    return out


def changed(path: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Path:
    """Copy a person file with its tensors and its header changed."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, out, metadata=header)
    return out


def test_header_tells_what_it_was_made_from_and_that_it_shows_a_real_person(person_file: Path) -> None:
    with safe_open(person_file, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "export3d-person-1"
    assert "real person" in header["shows"]
    assert header["version"] == __version__
    assert json.loads(header["made_from"]) == {file_sha256(SOURCE): "source.jpg", file_sha256(DRIVE): "drive.mp4"}


def test_person_is_animated_as_its_photo_with_the_other_photos_and_its_own_basis(
    animator: Animator, person_file: Path
) -> None:
    person = read_portrait(person_file)
    assert isinstance(person, Person) and len(person.photos) == 3
    np.testing.assert_array_equal(person.photos[0], read_image(SOURCE))
    portrait = load_photo(animator, person_file, PortraitOptions())
    assert len(portrait.others) == 2
    assert animator.model.flow is not None and portrait.model.flow is not None
    torch.testing.assert_close(portrait.model.flow.basis, person.basis)
    assert not torch.equal(portrait.model.flow.basis, animator.model.flow.basis)
    assert portrait.model.generator.state_dict().keys() == animator.model.generator.state_dict().keys()
    shared = zip(portrait.model.parameters(), animator.model.parameters(), strict=True)
    assert all(a is b for a, b in shared)  # only the basis, a buffer, is its own
    motion = animator.portrait(person.photos[1]).motion  # of a frame of the video
    with pytest.raises(ValueError, match="read-only"):
        person.photos[1][0] = 0
    own, alone = (next(animator.animate(p, [motion])) for p in (portrait, animator.portrait(person.photos[0])))
    assert own.shape == alone.shape and not np.array_equal(own, alone)


def test_expression_of_the_photo_changes_nothing(animator: Animator, person_file: Path) -> None:
    """The driver's measures are those beyond the person's own basis, as the photo's are."""
    portrait = load_photo(animator, person_file, PortraitOptions())
    assert np.abs(animator.coefficients(portrait.motion.beta) - portrait.source.coefficients.numpy()).max() > 1e-4
    assert np.abs(animator.expression_change(portrait, portrait.motion.beta)).max() < 1e-6
    driven, still = (
        next(animator.animate(portrait, [portrait.motion])), next(animator.view(portrait, portrait.motion.camera)),
    )  # fmt: skip
    assert np.abs(driven.astype(int) - still).max() <= 1


@pytest.mark.parametrize(
    "options",
    [ReenactOptions(face="right"), ReenactOptions(face="all"), ReenactOptions(pairs=(("index:1", DRIVE),))],
)
def test_person_is_not_put_onto_other_faces(animator: Animator, person_file: Path, options: ReenactOptions) -> None:
    with pytest.raises(InputError, match=r"person.safetensors is tuned to the largest face in it: leave out other"):
        load_portraits(animator, person_file, options)


def test_half_precision_shares_the_weights_and_reads_them_once(
    animator: Animator, person_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[object]()
    monkeypatch.setattr("export3d_cli.core.animation.animator.fingerprint", lambda m: calls.append(m) or fingerprint(m))
    half = Animator(animator.fp32_model, device=animator.device, precision="bf16")
    portrait = half.portrait(read_portrait(person_file))
    assert len(portrait.others) == 2 and len(calls) == 1
    assert all(a is b for a, b in zip(portrait.model.parameters(), half.model.parameters(), strict=True))


def test_kept_photo_is_used_like_the_whole_one(animator: Animator) -> None:
    """In a wide photo with the head off centre, the stored part is smaller, and it gives the same face crop."""
    first = read_image(SOURCE)
    photo = np.pad(first[60:], ((0, 0), (0, 300), (0, 0)), mode="edge")
    cut = _cut_head(photo, find_photo_face(animator.tracker(), photo))
    assert cut.shape[1] < photo.shape[1]
    (whole,), (part,) = (animator.portrait(first, also={"it": image}).others for image in (photo, cut))
    assert np.abs(whole.crop.astype(int) - part.crop).mean() < 1


def test_equal_inputs_give_equal_files(animator: Animator, person_file: Path, tmp_path: Path) -> None:
    options = PersonalizeOptions(video=DRIVE, duration=1.0, frames=2, force=True)
    again = tmp_path / "again.person.safetensors"
    personalize(animator, SOURCE, again, options)
    assert again.read_bytes() == person_file.read_bytes()


def test_video_of_somebody_else_is_refused_by_name(animator: Animator, tmp_path: Path) -> None:
    out = tmp_path / "me.person.safetensors"
    other = example_path("astronaut.jpg")
    with pytest.raises(InputError, match=r"drive.mp4 at \d.\d s seems to show somebody else .* --force"):
        personalize(animator, other, out, PersonalizeOptions(video=DRIVE, duration=0.2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("me.safetensors", PersonalizeOptions(video=DRIVE), "must end in .person.safetensors"),
        ("me.person.safetensors", PersonalizeOptions(), "give more photos of the person, or a video"),
        ("me.person.safetensors", PersonalizeOptions(also=(SOURCE,) * 12), "at most 12 photos, got 13"),
        ("me.person.safetensors", PersonalizeOptions(also=(SOURCE,)), "two of the photos are the same file"),
    ],
)
def test_unfit_outputs_and_inputs_are_refused(
    animator: Animator, tmp_path: Path, name: str, options: PersonalizeOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        personalize(animator, SOURCE, tmp_path / name, options)
    assert list(tmp_path.iterdir()) == []


def test_person_file_is_refused_where_only_its_first_photo_would_be_used(
    animator: Animator, person_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again.person.safetensors"
    for call in (
        lambda: personalize(animator, person_file, out, PersonalizeOptions(video=DRIVE)),
        lambda: personalize(animator, SOURCE, out, PersonalizeOptions(also=(person_file,))),
        lambda: load_photo(animator, SOURCE, PortraitOptions(also=(person_file,))),
        lambda: write_look(person_file, tmp_path / "look.png", PortraitOptions(look=Look(age=20))),
    ):
        with pytest.raises(InputError, match=r"me.person.safetensors is a person file, which stands for .*: give a ph"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_large_photo_is_reduced_with_a_note_and_the_summary_has_nothing_of_a_video(
    animator: Animator, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    write_image(large, cv2.resize(read_image(SOURCE), (1200, 1200)))
    out = tmp_path / "me.person.safetensors"
    summary = personalize(animator, large, out, PersonalizeOptions(also=(SOURCE,)))
    assert summary.notes == (f"{large} is kept at 1080 pixels, its longer side",)
    assert Person.load(out).photos[0].shape == (1080, 1080, 3)
    assert summary.tracked is None and summary.landmark_error is None
    assert summary.size_mb == round(summary.size_mb, 1)


def test_interrupt_leaves_nothing(animator: Animator, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize(
            animator, SOURCE, tmp_path / "me.person.safetensors", PersonalizeOptions(video=DRIVE), progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_person_of_other_weights_is_refused_in_one_line(animator: Animator, person_file: Path) -> None:
    person = replace(Person.load(person_file), weights="0" * 64)
    with pytest.raises(InputError, match="me was made with other weights: pass those by --weights"):
        animator.portrait(person, name="me")
    with pytest.raises(InputError, match="already holds all photos of the person"):
        animator.portrait(person, also={"more": person.photos[0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.pop("format"), "is no person file: format is None"),
        (lambda t, h: h.pop("weights"), "is damaged"),
        (lambda t, h: h.update(weights="../x"), "weights must be a sha256"),
        (lambda t, h: h.update(made_from="[" * 9999), "is damaged"),
        (lambda t, h: h.update(made_from='{"a": 1}'), "made_from must be"),
        (lambda t, h: [t.pop(k) for k in list(t) if k.startswith("photo.")], "1 to 12 photos, got 0"),
        (lambda t, h: t.update({"photo.5": t.pop("photo.1")}), "is damaged"),
        (lambda t, h: t.update({"photo.0": t["photo.0"].float()}), "a photo must be uint8"),
        (lambda t, h: t.update({"photo.0": t["photo.0"][:1]}), "a photo has 512x1 pixels"),
        (lambda t, h: t.update({"more": torch.zeros(3)}), "other tensors than photos and a basis"),
        (lambda t, h: t.update({"tuned.flow.basis": t["tuned.flow.basis"] * torch.nan}), "not finite"),
        (lambda t, h: t.update({"tuned.flow.basis": t["tuned.flow.basis"].int()}), "other tensors"),
        (lambda t, h: t.update({"tuned.decoder.bias": torch.zeros(3)}), "other tensors"),
        (
            lambda t, h: t.update({"photo.1": torch.zeros_like(t["photo.1"])}),
            "no face found in photo 2 of .*bad.person.safetensors: make the file again",
        ),
        (
            lambda t, h: t.update({"tuned.flow.basis": torch.zeros(3)}),
            r"bad.person.safetensors is damaged: the basis is \(3,\), the network's \(\d+, 478, 3\)",
        ),
        (lambda t, h: t.update({"tuned.flow.triangles": torch.zeros(902, 4)}), "other tensors"),
        (lambda t, h: t.update({"tuned.__class__": torch.zeros(3)}), "other tensors"),
    ],
)
def test_damaged_and_hostile_files_are_refused(
    animator: Animator, person_file: Path, tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    bad = changed(person_file, tmp_path / "bad.person.safetensors", change)
    with pytest.raises((InputError, NoFaceError), match=message):
        load_photo(animator, bad, PortraitOptions())


def test_basis_of_the_person_is_found_and_frames_are_chosen_by_what_they_add(animator: Animator) -> None:
    """Landmarks made by another basis give that basis, and a single odd frame is chosen first."""
    assert animator.model.flow is not None
    portrait = animator.portrait(read_image(SOURCE))
    rng = np.random.default_rng(0)
    motion = portrait.motion.select(np.zeros(300, int))
    beta = motion.beta.copy()
    beta[1:] += rng.normal(0, 0.2, beta[1:].shape).astype(np.float32)
    shipped = animator.model.flow.basis.numpy()
    lam = animator.coefficients(beta)[:, : len(shipped)]
    truth = shipped + rng.normal(0, 0.002, shipped.shape)
    change = (lam - lam[0]) * animator.model.config.expression_gain
    moved = np.einsum("tn,nkc->tkc", change, truth)  # head frame of a camera that looks almost along its z axis
    rotation = np.linalg.inv(motion.camera[0, :16].reshape(4, 4))[:3, :3]
    pixels = (moved @ rotation.T) / 2.7 * 4.2647
    motion = replace(motion, beta=beta, landmarks=(motion.landmarks + pixels).astype(np.float32))
    basis, (before, after) = fit_basis(animator, motion)
    assert after < before / 3
    assert np.abs(basis.numpy() - truth).mean() < np.abs(shipped - truth).mean() / 2

    odd = portrait.motion.select(np.zeros(9, int))
    odd.landmarks[5] += 0.02 * rng.normal(size=(478, 3)).astype(np.float32)
    nearest, *chosen = choose_frames(odd, 1, 2)
    assert chosen == [5] and nearest != 5  # the others are the photo itself
