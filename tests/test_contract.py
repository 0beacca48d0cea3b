"""What a user can count on, line by line, and the tests that hold each line.

`CONTRACT` is the promise of the command line in plain words. The tests here see to it that every test it names exists
and that no option is left without one; `test_promises.py` holds the lines that had no test of their own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from export3d_cli.main import cli

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "export3d_cli"

CONTRACT = {  # promise -> tests that hold it, `file under tests/::function`
    # commands
    "reenact is driven by a video": ["commands/test_animation.py::test_reenact_keeps_the_rate_and_tells_in_json"],
    "reenact is driven by an image": ["core/test_driver.py::test_a_picture_is_one_frame"],
    "reenact is driven by a folder of pictures": [
        "commands/test_animation.py::test_a_folder_of_pictures_drives_and_pictures_come_out",
    ],
    "reenact is driven by a .motion.npz": ["commands/test_animation.py::test_a_preprocessed_motion_drives"],
    "reenact is driven by an ARKit CSV": ["core/test_control.py::test_a_phone_s_csv_drives"],
    "novel-view orbits: --yaw, --pitch, --roll, --frames": [
        "core/test_animate.py::test_orbits_take_the_angles_asked_for_at_the_photo_s_distance",
        "commands/test_look.py::test_one_angle_is_a_marked_picture",
        "test_promises.py::test_angles_and_frames_are_the_command_s",
    ],
    "novel-view --drive takes an expression": ["commands/test_look.py::test_depth_and_a_driver_s_expression"],
    "novel-view --depth and --mesh": [
        "commands/test_look.py::test_depth_and_a_driver_s_expression",
        "commands/test_look.py::test_a_mesh_is_written_alone_or_beside_pictures",
    ],
    "edit-basis --describe says what a vector means": [
        "commands/test_look.py::test_describe_names_what_moves_a_vector_and_what_it_moves",
    ],
    "edit-basis moves one or several --v": [
        "commands/test_look.py::test_edit_basis_takes_negative_ranges_and_needs_something_to_do",
        "core/test_animate.py::test_views_and_edits_change_what_they_say",
    ],
    "edit-basis --grid writes a contact sheet": [
        "commands/test_look.py::test_sheets_hold_the_sweep_and_every_basis_vector",
    ],
    "preprocess makes a motion file of a video": ["commands/test_animation.py::test_a_preprocessed_motion_drives"],
    "preprocess makes a data set of a folder": ["core/test_preprocess.py::test_a_video_becomes_a_clip_per_scene"],
    "train runs its stages in order": ["core/train/test_adversarial.py::test_stages_keep_their_order"],
    "train takes key=value and --dry-run": [
        "test_main.py::test_train_dry_run_prints_the_resolved_configuration",
        "commands/test_train.py::test_dry_run_tells_sizes_and_costs",
    ],
    "train goes on where it stopped": ["core/train/test_trainer.py::test_resume_is_exact"],
    "evaluate writes a table, JSON and pictures": ["core/test_evaluate.py::test_tables_and_pictures_are_written"],
    "weights list and verify": ["test_main.py::test_weights_list_and_verify"],
    "weights download, info and push": [
        "core/test_hub.py::test_a_file_is_fetched_once_pinned_and_checked",
        "core/test_hub.py::test_weights_are_uploaded_with_a_card",
    ],
    "weights made by train are usable at once": ["test_api.py::test_the_python_of_the_readme_runs"],
    "bench tells stages, frames/s and memory, also as JSON": [
        "commands/test_look.py::test_bench_tells_every_stage_and_leaves_nothing",
    ],
    "doctor tells a line for each finding, and what to do": [
        "commands/test_look.py::test_doctor_is_content_here",
        "commands/test_look.py::test_doctor_says_what_to_do",
    ],
    "three commands run exactly as typed, the last two without a file": [
        "test_promises.py::test_three_commands_run_exactly_as_typed_without_a_network",
    ],
    # weights
    "it works offline: embedded weights are the default": [
        "test_promises.py::test_three_commands_run_exactly_as_typed_without_a_network",
        "test_api.py::test_the_examples_of_the_door_are_true",
        "test_weights.py::test_every_listed_file_is_there_and_as_listed",
    ],
    "--weights takes a name, a path, hf:owner/repo[@revision][:file]": [
        "test_weights.py::test_names_and_paths_resolve",
        "test_weights.py::test_malformed_hub_names_are_refused",
        "core/test_hub.py::test_a_file_is_fetched_once_pinned_and_checked",
    ],
    "downloads resume, and are tried again": [
        "core/test_hub.py::test_a_server_in_trouble_is_asked_again_and_a_broken_body_resumed",
        "core/test_hub.py::test_a_server_that_stays_in_trouble_is_an_error",
    ],
    "downloads are checked by sha256": ["core/test_hub.py::test_a_wrong_hash_is_refused_and_not_kept"],
    "HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured": [
        "core/test_hub.py::test_no_network_and_offline_say_which_command_fetches_it",
        "core/test_hub.py::test_private_weights_need_a_token_which_is_never_shown",
    ],
    "offline and absent: the error names the command that fetches": [
        "core/test_hub.py::test_no_network_and_offline_say_which_command_fetches_it",
    ],
    # device
    "--device and --precision; auto takes CUDA when usable": ["core/test_animate.py::test_devices_and_precisions"],
    "the device that was taken is told": ["test_promises.py::test_the_summary_tells_the_device"],
    "--batch auto|N, halved where memory runs out": [
        "core/test_device.py::test_where_memory_runs_out_half_as_many_are_made",
        "core/test_device.py::test_an_animator_short_of_memory_makes_the_same_frames",
        "test_promises.py::test_batch_is_auto_or_a_number",
    ],
    "same seed, same machine: same bytes": [
        "commands/test_animation.py::test_the_same_command_gives_the_same_bytes",
        "core/test_animate.py::test_the_same_weights_and_files_give_the_same_frames",
    ],
    # video
    "any container and codec that ffmpeg reads": ["core/media/test_video.py::test_other_containers_are_read"],
    "rotation and EXIF are applied": [
        "core/media/test_video.py::test_rotation_is_applied_and_the_size_agrees",
        "core/media/test_image.py::test_exif_orientation_is_applied",
    ],
    "variable rates become constant, and it is said": [
        "core/media/test_video.py::test_variable_rate_is_resampled_and_keeps_its_length",
        "core/media/test_cases.py::test_what_is_read_keeps_rate_length_and_step",
    ],
    "the rate is kept exactly, as a fraction": [
        "core/media/test_video.py::test_the_frame_rate_is_exact",
        "core/test_animate.py::test_length_and_rate_are_the_driver_s",
    ],
    "the result is as long as the driver": [
        "core/test_animate.py::test_length_and_rate_are_the_driver_s",
        "core/media/test_cases.py::test_what_is_written_keeps_rate_length_and_step",
    ],
    "--audio driver|none|FILE": [
        "core/test_animate.py::test_the_driver_s_sound_is_skipped_along_and_another_file_s_is_not",
        "core/media/test_video.py::test_sound_joins_the_picture_and_is_no_longer",
    ],
    "--start, --duration, --max-frames, --fps": [
        "commands/test_animation.py::test_compare_start_duration_and_fps",
        "core/media/test_video.py::test_start_duration_rate_and_size",
        "test_main.py::test_ranges_and_rates",
    ],
    "--crf": ["test_promises.py::test_crf_makes_smaller_files"],
    "mp4, mov, webm, mkv, gif, pictures, by the suffix": [
        "core/media/test_video.py::test_what_is_written_is_read_again",
        "core/media/test_video.py::test_a_gif_is_written_with_its_mark",
        "core/media/test_inputs.py::test_a_picture_a_frame_is_written_and_read_again",
    ],
    "memory stays flat": ["core/face/test_smooth.py::test_a_long_driver_takes_no_more_memory_than_a_short_one"],
    # faces
    "--face largest|left|right|index:N": ["core/test_control.py::test_faces_are_chosen_from_left_to_right"],
    "one face of several is followed in the driver": [
        "core/test_driver.py::test_one_face_of_two_is_followed_while_it_is_hidden",
        "test_promises.py::test_the_driver_s_face_and_its_reader_are_chosen",
    ],
    "--on-missing hold|skip|fail, counted": [
        "core/test_driver.py::test_frames_without_a_face_are_held_left_out_or_refused",
        "core/test_animate.py::test_frames_without_a_face_are_held",
        "test_promises.py::test_a_driver_without_any_face_is_3",
    ],
    "no face in the source is 3 and names the file": [
        "commands/test_animation.py::test_no_face_is_3_and_names_the_file",
    ],
    # what is driven
    "--drive expression,pose and their scales": ["core/test_control.py::test_expression_arithmetic_is_in_lambda"],
    "--pose relative|absolute": [
        "core/test_control.py::test_absolute_pose_goes_from_the_source_s_to_the_driver_s",
        "core/test_control.py::test_relative_pose_moves_the_source_s_own_camera",
    ],
    "--relative-expression with --reference-frame": [
        "core/test_control.py::test_at_its_reference_frame_a_relative_driver_leaves_the_source_as_it_is",
    ],
    "--smooth off|light|strong": ["core/test_control.py::test_smoothing_is_off_or_on"],
    # picture
    "--compare shows source, driver and result": [
        "core/test_animate.py::test_compare_shows_source_driver_and_result",
    ],
    "--size: frames have the photo's own detail": [
        "core/test_frames.py::test_larger_frames_are_nearer_to_the_larger_photo",
        "core/test_frames.py::test_what_is_around_the_crop_comes_into_view_when_the_head_gets_smaller",
        "core/test_frames.py::test_frames_are_as_large_as_asked_or_as_the_photo_allows",
        "core/model/test_superres.py::test_enlarged_a_face_shows_what_only_the_larger_photo_does",
    ],
    "--crop, --paste-back and --background": [
        "commands/test_animation.py::test_the_whole_photo_and_other_backgrounds",
        "commands/test_animation.py::test_a_video_is_no_portrait_and_a_picture_may_stay_uncut",
        "commands/test_animation.py::test_what_goes_not_together_is_2_before_weights_are_read",
        "core/test_compose.py::test_outside_the_square_the_photo_is_untouched_and_deep_inside_the_result_stands",
    ],
    # several sources
    "several sources share one tracked driver": [
        "core/test_batch.py::test_a_driver_is_tracked_once_and_a_failure_stops_no_other",
    ],
    "OUT may be a template": ["core/test_batch.py::test_names_stay_inside_their_folder"],
    "existing files are kept with a note, or --overwrite": [
        "core/test_batch.py::test_existing_results_are_kept_unless_overwritten",
        "commands/test_animation.py::test_an_existing_output_is_kept",
    ],
    "a failure does not stop the others: exit 1 and a list": [
        "commands/test_animation.py::test_several_sources_and_a_failure_is_1",
    ],
    # behaviour
    "writes are atomic": ["core/media/test_video.py::test_an_exception_leaves_neither_file_nor_process"],
    "Ctrl-C leaves neither half files nor processes: 130": [
        "test_terminal.py::test_ctrl_c_leaves_neither_half_files_nor_processes",
        "test_terminal.py::test_ctrl_c_ends_workers_too",
        "test_main.py::test_interruption_is_130",
    ],
    "a bar with frames/s and time left in a terminal; none with -q; NO_COLOR": [
        "test_terminal.py::test_a_bar_shows_frames_rate_and_time_left_and_none_with_quiet",
    ],
    "--json is one object on stdout": [
        "commands/test_animation.py::test_reenact_keeps_the_rate_and_tells_in_json",
        "test_promises.py::test_json_is_one_object_and_nothing_else_on_stdout",
    ],
    "--dry-run tells what would be done and writes nothing": [
        "core/test_batch.py::test_a_plan_says_what_would_be_done_and_writes_nothing",
        "commands/test_animation.py::test_controls_and_dry_run",
    ],
    "exit codes 0, 1, 2, 3, 4, 130": [
        "test_main.py::test_errors_are_one_line_and_an_exit_code",
        "test_main.py::test_misuse_is_2_and_says_why",
        "commands/test_animation.py::test_bad_files_are_2_and_bad_weights_4",
    ],
    "an error is one line; -v adds the traceback": ["test_main.py::test_errors_are_one_line_and_an_exit_code"],
    "a defect keeps its traceback": ["test_main.py::test_a_defect_keeps_its_traceback"],
    # flags
    "kebab-case, --x/--no-x, ranges A:B, helps with defaults": [
        "test_contract.py::test_options_are_kebab_case_with_a_help_a_default_and_an_opposite",
        "test_promises.py::test_what_was_said_before_is_undone",
        "test_main.py::test_ranges_and_rates",
    ],
    "completion in bash, zsh and fish": [
        "test_completion.py::test_commands_options_and_choices_are_completed",
        "test_completion.py::test_each_shell_gets_its_script",
        "test_completion.py::test_tab_in_a_real_bash",
    ],
    "alone it shows an overview; each --help has two valid examples": [
        "test_main.py::test_alone_it_shows_where_to_start",
        "test_main.py::test_every_help_ends_with_two_examples_that_are_valid",
    ],
    "--version tells torch, CUDA and ffmpeg": ["test_main.py::test_version_tells_what_results_depend_on"],
    "--help loads nothing heavy and is quick": [
        "test_main.py::test_help_imports_nothing_heavy",
        "test_main.py::test_help_is_quick",
    ],
    # safety
    "no pickle, no shell strings, YAML by safe_load": [
        "test_layers.py::test_no_pickle_and_no_shell",
        "test_promises.py::test_yaml_is_read_safely",
    ],
    "images and videos are bounded in size": [
        "core/media/test_image.py::test_a_decompression_bomb_is_refused_before_it_is_decoded",
        "core/media/test_video.py::test_a_huge_video_is_refused",
    ],
    "every output says in its metadata that it is synthetic": [
        "core/test_watermark.py::test_the_mark_of_the_metadata_is_found_in_every_format",
        "test_promises.py::test_three_commands_run_exactly_as_typed_without_a_network",
    ],
    "--watermark visible|invisible, and verify-mark": [
        "core/test_watermark.py::test_every_command_that_animates_marks_what_it_writes",
        "core/test_watermark.py::test_it_survives_h264_and_a_resize",
        "core/test_watermark.py::test_what_was_not_marked_is_not_found",
        "core/test_watermark.py::test_the_command_tells_both_marks",
    ],
}


BELOW = {  # options whose test calls what they call
    "--take": "core/test_evaluate.py::test_rows_are_spread_or_first_and_steadiness_has_neighbours",
}


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_tests_of_the_contract_exist(promise: str) -> None:
    for name in CONTRACT[promise]:
        file, _, wanted = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == wanted]
        assert len(found) == 1, name
        checks = [node for node in ast.walk(found[0]) if isinstance(node, (ast.Assert, ast.With))]
        calls = {
            node.func.attr for node in ast.walk(found[0]) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        assert checks or any("assert" in call or call == "verify" for call in calls), f"{name} checks nothing"


def commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command)
    for below in command.list_commands(context) if isinstance(command, click.Group) else ():
        part = command.get_command(context, below)  # type: ignore[union-attr]
        assert part is not None
        yield from commands(part, f"{name} {below}".strip())
    if name:
        yield name, command


OPTIONS = [
    (name, option) for name, command in commands(cli) for option in command.params if isinstance(option, click.Option)
]


def test_every_option_is_used_by_a_test() -> None:
    """By the command line, or through the field or argument that it fills."""
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    texts.append(Path(__file__).read_text(encoding="utf-8").rpartition("def run(")[2])  # without the table
    text = "\n".join(texts)
    used = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])", text)) | set(re.findall(r"\b([a-z_]+)=", text))
    used |= {option for option, test in BELOW.items() if test.partition("::")[2] in text}
    unused = {f"{name} {option.opts[-1]}" for name, option in OPTIONS if not used & {*option.opts, option.name}}
    assert not unused


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_are_kebab_case_with_a_help_a_default_and_an_opposite(name: str, option: click.Option) -> None:
    for word in (*option.opts, *option.secondary_opts):
        assert re.fullmatch(r"-[a-zV]|--[a-z]+(-[a-z]+)*", word), word
    record = option.get_help_record(click.Context(click.Command(name)))
    assert record is not None
    text = re.sub(r"\s*\[[^\]]*\]", "", record[1]).strip()
    assert len(text) >= 5, f"{name} {option.opts[-1]} has no help"
    if option.is_flag:
        assert option.secondary_opts, f"{name} {option.opts[-1]} cannot be undone"
    elif option.default is not None and not option.multiple and not callable(option.default):
        absent = type(option.default).__name__ in ("Sentinel", "_Sentinel")  # newer versions of Click: not given
        assert absent or "default" in record[1], f"{name} {option.opts[-1]} does not tell its default"
