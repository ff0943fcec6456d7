"""What cfamc survives: each promise, the lines that keep it, and the test that turns red without them.

`python tests/protections.py` takes each protection out of a copy of the package and runs its test, which has to fail;
words choose among promises and tests: `python tests/protections.py links memory`. The checkout is never written to.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pydantic  # noqa: F401 - loaded once, for all tests, as the next are
import pytest
import torch  # noqa: F401
import torchvision  # noqa: F401
import typer  # noqa: F401

ROOT = Path(__file__).parents[1]
SECONDS = 300  # for one test; one that hangs without its protection is as good as red
SAMPLE = 10  # of the table, for `--sample`


@dataclass(frozen=True)
class Protection:
    """A text of the package whose loss a test notices."""

    promise: str
    file: str  # in the package
    text: str  # there once; with the next, what a careless change would do
    instead: str
    test: str  # below tests/

    def taken_out(self, package: Path) -> tuple[str, str]:
        """The file with the protection and without it.

        Raises:
            ValueError: The text is not there, or more than once: the table has to follow the code.
        """
        whole = (package / self.file).read_text(encoding="utf-8")
        if (count := whole.count(self.text)) != 1:
            raise ValueError(f"{self.file} has {count} times: {self.text!r}")
        return whole, whole.replace(self.text, self.instead)


def _of(promise: str, *rows: tuple[str, str, str, str]) -> Iterator[Protection]:
    return (Protection(promise, *row) for row in rows)


TABLE: tuple[Protection, ...] = (
    *_of(
        "A training that was killed and resumed equals one that was not, bit for bit",
        (
            "engine/pretrain.py",
            "                buffer.copy_(kept)\n",
            "",
            "test_pretrain.py::test_stopped_after_every_batch_equals_straight_through",
        ),
        (
            "store/ledger.py",
            "            cut(path, _position(positions.get(path.name, 0), path))\n",
            "            _position(positions.get(path.name, 0), path)\n",
            "test_ledger.py::test_a_cut_ledger_forgets_the_evaluations_beyond_the_checkpoint",
        ),
    ),
    *_of(
        "A save that is cut leaves a whole checkpoint, and litter that only the dead left is swept",
        (
            "store/files.py",
            "    temp = path.parent / _temp_name()\n",
            "    temp = path\n",
            "test_files.py::test_a_failing_call_leaves_the_old_file",
        ),
        (
            "store/files.py",
            " and process_start(int(found[2])) != int(found[3])",
            "",
            "test_files.py::test_sweep_removes_only_what_the_dead_left",
        ),
    ),
    *_of(
        "A signal saves the batch under way and ends with a code of its own; a second one ends at once",
        (
            "engine/pretrain.py",
            "        if signal or due:\n",
            "        if due:\n",
            "test_process_signals.py::test_a_signal_saves_the_batch_under_way",
        ),
        (
            "commands/common.py",
            "        if self.received or not self._deferred:\n",
            "        if not self._deferred:\n",
            "test_process_signals.py::test_the_second_signal_ends_at_once",
        ),
    ),
    *_of(
        "Processes of torchrun end together, after all is written",
        (
            "commands/pretrain.py",
            "            distributed.largest(signal, world)",
            "            pass",
            "test_ledger.py::test_no_process_leaves_before_an_interruption_is_written_down",
        ),
        (
            "engine/distributed.py",
            "        if world.size == 1 or not (\n",
            "        if world.size >= 1 or not (\n",
            "test_device.py::test_a_process_that_is_gone_is_called_so",
        ),
    ),
    *_of(
        "An evaluation that was killed and resumed equals one that was not",
        (
            "store/outcomes.py",
            "            save_record(self.folder / OUTCOMES, self.as_record())\n",
            "",
            "test_outcomes.py::test_what_is_committed_is_read_back",
        ),
        (
            "store/files.py",
            "            os.ftruncate(self._descriptor, self._size)\n            self._sha256",
            "            self._sha256",
            "test_measures.py::test_a_measure_whose_last_line_is_cut_short_measures_that_block_again",
        ),
        (
            "store/outcomes.py",
            "        elif known != _as_dear(outcome, known):\n",
            "        elif False:\n",
            "test_outcomes.py::test_a_stage_that_comes_out_differently_is_refused",
        ),
    ),
    *_of(
        "Nothing goes on from a changed recipe or changed data",
        (
            "commands/pretrain.py",
            "(differing := file.differing_keys(recipe, wanted))",
            "(differing := [])",
            "test_process_runs.py::test_a_changed_recipe_is_not_resumed",
        ),
        (
            "engine/pretrain.py",
            '            if saved.progress["recipe"] != self.digest:\n',
            "            if False:\n",
            "test_pretrain.py::test_a_checkpoint_of_another_recipe_is_refused",
        ),
        (
            "store/ledger.py",
            "        if before is not None and before != data:\n",
            "        if False:\n",
            "test_ledger.py::test_wall_time_is_that_of_all_sittings",
        ),
    ),
    *_of(
        "A damaged checkpoint is named, and the one before it is taken",
        (
            "engine/checkpoint.py",
            "        if sha256(data) != digest:\n",
            "        if False:\n",
            "test_checkpoint.py::test_a_thousand_flipped_bits_are_noticed",
        ),
        (
            "engine/checkpoint.py",
            " or digest not in (None, _own_digest(manifest))",
            "",
            "test_checkpoint.py::test_a_thousand_flipped_bits_are_noticed",
        ),
        (
            "engine/checkpoint.py",
            "            problems.append(error)\n",
            "            raise\n",
            "test_checkpoint.py::test_the_newest_valid_checkpoint_is_found_and_the_damage_told",
        ),
        (
            "engine/pretrain.py",
            "            if [tuple(part.shape) for part in delta] != (self._carried() if step else []):\n",
            "            if False:\n",
            "test_pretrain.py::test_a_state_that_does_not_fit_is_refused",
        ),
        (
            "engine/heads/supervised.py",
            "(step and saved.state.keys() != known)",
            "False",
            "test_probe.py::test_a_checkpoint_whose_state_is_of_another_optimizer_is_refused",
        ),
    ),
    *_of(
        "Nothing is ever opened as a pickle",
        (
            "engine/heads/foreign_file.py",
            "weights_only=True",
            "weights_only=False",
            "test_imported.py::test_what_is_no_plain_tensor_is_named",
        ),
        (
            "engine/checkpoint.py",
            '        if data[:2] == b"PK" or data[:1] == b"\\x80":\n',
            "        if False:\n",
            "test_checkpoint.py::test_what_is_no_safetensors_file_is_refused",
        ),
    ),
    *_of(
        "A full disk and a failing device leave the old file and say what is needed",
        (
            "store/files.py",
            "            _remove(temp)\n            raise\n        sync(path.parent)\n",
            "            raise\n        sync(path.parent)\n",
            "test_files.py::test_a_failing_call_leaves_the_old_file",
        ),
        (
            "store/files.py",
            '            cause += f" ({_space(path, needed)})"\n',
            "",
            "test_files.py::test_a_full_disk_is_named",
        ),
        (
            "store/files.py",
            "                with suppress(OSError):  # else the next opening cuts off the torn line\n"
            "                    os.ftruncate(self._descriptor, self._size)\n",
            "",
            "test_files.py::test_an_append_that_fails_half_way_is_taken_back",
        ),
    ),
    *_of(
        "The umask is heeded, and any name is a file name",
        (
            "store/files.py",
            "0o666)  # the umask has its say",
            "0o600)",
            "test_files.py::test_the_umask_is_respected",
        ),
        (
            "store/runs.py",
            're.sub(r"[^a-z0-9]+", "-", text)',
            "text",
            "test_store.py::test_a_slug_is_a_plain_file_name",
        ),
    ),
    *_of(
        "Data are on the disk before their name is, and the name before the next step",
        (
            "store/files.py",
            "            sync(temp)\n",
            "",
            "test_files.py::test_order_of_a_file",
        ),
        (
            "store/files.py",
            "            raise\n        sync(path.parent)\n",
            "            raise\n",
            "test_files.py::test_order_of_a_folder",
        ),
    ),
    *_of(
        "A run has one owner and an id of its own; equal evaluations at once do the work once",
        (
            "store/runs.py",
            "            path.mkdir()\n            sync(store)\n",
            "            path.mkdir(exist_ok=True)\n            sync(store)\n",
            "test_store.py::test_ids_that_collide_are_drawn_again",
        ),
        (
            "store/runs.py",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            "test_store.py::test_a_live_process_holds_its_run_and_a_dead_one_does_not",
        ),
        (
            "store/runs.py",
            "    with lock(RunFolder(folder), wait=wait):\n        yield\n",
            "    yield\n",
            "test_store.py::test_who_waits_for_its_turn_finds_what_was_begun_meanwhile",
        ),
    ),
    *_of(
        "A comparison names what it cannot read, and never ranks what may not be compared",
        (
            "store/files.py",
            'read_bytes(path).split(b"\\n")[:-1]',
            'read_bytes(path).split(b"\\n")',
            "test_files.py::test_a_torn_last_line_is_left_out_and_cut_off",
        ),
        (
            "comparison/gather.py",
            "Condition(data.dataset, data.split, data.fingerprint, head,",
            'Condition(data.dataset, data.split, "", head,',
            "test_compare_command.py::test_other_data_stand_apart",
        ),
        (
            "comparison/gather.py",
            "            if _is_of_final_encoder(record, run, trained):\n",
            "            if True:\n",
            "test_compare_command.py::test_results_of_an_encoder_that_was_trained_on_are_left_out",
        ),
        (
            "comparison/tables.py",
            "    trusted = [row for row in rows if not row.failed]\n",
            "    trusted = rows\n",
            "test_compare.py::test_what_is_not_trusted_is_shown_but_never_wins",
        ),
    ),
    *_of(
        "Hostile text is spelled out, never obeyed",
        (
            "report/terminal.py",
            "    if not shown.isprintable():",
            "    if False:",
            "test_terminal.py::test_hostile_text_is_spelled_out",
        ),
        (
            "report/terminal.py",
            'self._console.say(Text.assemble(("warning: ", "bold yellow"), clean(text)))',
            'self._console.say(Text.assemble(("warning: ", "bold yellow"), text))',
            "test_terminal.py::test_hostile_text_is_spelled_out",
        ),
    ),
    *_of(
        "A recipe is checked whole, key by key, and read only from a small regular file",
        (
            "recipe/schema.py",
            'frozen=True, extra="forbid", strict=True, allow_inf_nan=False)',
            'frozen=True, extra="ignore", strict=True, allow_inf_nan=False)',
            "test_recipe_file.py::test_bad_overrides",
        ),
        (
            "recipe/schema.py",
            'extra="forbid", strict=True, allow_inf_nan=False)',
            'extra="forbid", strict=False, allow_inf_nan=False)',
            "test_recipe_file.py::test_one_problem",
        ),
        (
            "recipe/file.py",
            "    if len(data) > MAX_BYTES:\n",
            "    if False:\n",
            "test_recipe_file.py::test_text_that_is_no_recipe",
        ),
        (
            "store/files.py",
            "            if not stat.S_ISREG(status.st_mode):\n",
            "            if False:\n",
            "test_files.py::test_reading_refuses_what_is_no_file",
        ),
    ),
    *_of(
        "A radius is an exact number of [0, 1]: 8 is asked back as 8/255",
        (
            "recipe/schema.py",
            "    if fraction(text) > 1:\n",
            "    if False:\n",
            "test_recipe.py::test_other_numbers_are_refused",
        ),
        (
            "recipe/schema.py",
            "    if ratio is not None and int(ratio[2]) == 0:\n",
            "    if False:\n",
            "test_recipe.py::test_other_numbers_are_refused",
        ),
    ),
    *_of(
        "Any recipe and any flag is valid or a problem with a place, never a traceback",
        (
            "recipe/file.py",
            "    except RecursionError:\n",
            "    except ZeroDivisionError:\n",
            "test_recipe_file.py::test_text_that_is_no_recipe",
        ),
        (
            "recipe/file.py",
            "    except (ValueError, RecursionError):\n",
            "    except ValueError:\n",
            "test_recipe_file.py::test_bad_overrides",
        ),
    ),
    *_of(
        "Images are opened by formats that run nothing; changed data is refused; nobody trains on what is held out",
        (
            "engine/data/folder.py",
            "Image.open(path, formats=FORMATS)",
            "Image.open(path)",
            "test_data.py::test_files_that_cannot_be_used_are_named",
        ),
        (
            "engine/data/folder.py",
            "    if width * height > MAX_PIXELS:\n",
            "    if False:\n",
            "test_data.py::test_files_that_cannot_be_used_are_named",
        ),
        (
            "commands/probe.py",
            "    if found != expected:\n",
            "    if False:\n",
            "test_probe_command.py::test_what_changed_since_is_noticed",
        ),
        (
            "engine/data/archives.py",
            "        if digest.hexdigest() != remote.md5:\n",
            "        if False:\n",
            "test_data.py::test_downloads_are_checked",
        ),
        (
            "engine/data/sets.py",
            "        return images.take(left)\n",
            "        return images\n",
            "test_holdout.py::test_no_batch_of_training_has_a_held_out_image",
        ),
    ),
    *_of(
        "What is not finite is never saved, the last good checkpoint stays, an export is compared with the live model",
        (
            "engine/pretrain.py",
            "        self.journal.check_finite(self.encoder, self.average.encoder, step=self.step)\n",
            "",
            "test_pretrain.py::test_divergence_is_found_when_the_run_is_stopped",
        ),
        (
            "engine/journal.py",
            "        if len(bad) or not bool(finite.all()):\n",
            "        if len(bad):\n",
            "test_pretrain.py::test_every_weight_and_buffer_is_asked_whether_it_is_finite",
        ),
        (
            "engine/checkpoint.py",
            "        if not torch.isfinite(tensor).all():\n            raise _bad(folder / MODEL",
            "        if False:\n            raise _bad(folder / MODEL",
            "test_checkpoint.py::test_weights_that_are_not_finite_are_refused",
        ),
        (
            "engine/export.py",
            "        if not torch.allclose(found, wanted, rtol=RTOL, atol=ATOL):\n",
            "        if False:\n",
            "test_export.py::test_another_class_nan_and_another_shape_are_differences",
        ),
    ),
    *_of(
        "Memory that runs out is called so",
        (
            "engine/device.py",
            "any(words in text for words in _NO_MEMORY)",
            "False",
            "test_device.py::test_memory_that_is_out_is_called_so",
        ),
    ),
    *_of(
        "The same seed gives the same bytes, whatever the order or the hash seed, and an attack leaves no trace",
        (
            "engine/checkpoint.py",
            "tensors[name].detach().cpu().contiguous()",
            "tensors[name].detach().cpu()",
            "test_checkpoint.py::test_equal_tensors_give_equal_bytes_in_any_order_and_layout",
        ),
        (
            "store/outcomes.py",
            "json.dumps(settings, sort_keys=True,",
            "json.dumps(settings,",
            "test_outcomes.py::test_the_key_is_that_of_the_settings_in_any_order",
        ),
        (
            "engine/evaluation/verify.py",
            "torch.random.fork_rng(devices=devices), full_precision(device)",
            "full_precision(device)",
            "test_blocks.py::test_the_seed_decides_and_the_callers_random_state_does_not",
        ),
        (
            "engine/evaluation/verify.py",
            "                part.training = mode\n",
            "                pass\n",
            "test_blocks.py::test_an_evaluation_leaves_no_trace",
        ),
    ),
    *_of(
        "Closed streams, full pipes and narrow terminals are survived, and --json parses",
        (
            "cli.py",
            "        open_standard_streams()\n",
            "",
            "test_cli.py::test_no_file_takes_the_number_of_a_closed_stream",
        ),
        (
            "report/terminal.py",
            'text if text.isascii() else text.encode(encoding, "backslashreplace").decode(encoding)',
            "text",
            "test_terminal.py::test_what_an_encoding_lacks_is_spelled_out",
        ),
        (
            "report/terminal.py",
            "            return value if math.isfinite(value) else None\n",
            "            return value\n",
            "test_terminal.py::test_json_on_stdout_always_parses",
        ),
    ),
    *_of(
        "No secret of the environment is kept or shown",
        (
            "engine/data/archives.py",
            "except (http.client.InvalidURL, UnicodeError):",
            "except UnicodeError:",
            "test_data.py::test_the_password_of_a_proxy_is_not_shown",
        ),
        (
            "store/environment.py",
            'git("rev-parse", "HEAD")',
            'git("remote", "-v")',
            "test_records.py::test_the_environment_holds_no_secret",
        ),
    ),
    *_of(
        "No socket is opened but for a download that is needed",
        (
            "engine/data/archives.py",
            "    if path.is_file():\n        return path\n",
            "",
            "test_data.py::test_downloads_are_checked",
        ),
    ),
    *_of(
        "An attack that fools itself raises a flag: no gradient, noise, company, no logits, confidence",
        (
            "engine/evaluation/audit.py",
            'judge("zero-gradient", share(blind),',
            'judge("zero-gradient", 0.0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[no_gradient]",
        ),
        (
            "engine/evaluation/audit.py",
            'judge("random", float(change.nan_to_num(nan=0.0)),',
            'judge("random", 0.0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[noisy]",
        ),
        (
            "engine/evaluation/audit.py",
            'judge("probabilities", share(probable),',
            'judge("probabilities", 0.0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[probabilities]",
        ),
        (
            "engine/evaluation/audit.py",
            'judge("logit-scale", share(gap > _LARGE_GAP),',
            'judge("logit-scale", 0.0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[loud]",
        ),
        (
            "engine/evaluation/audit.py",
            'judge("test-time-gradient", watch.operations,',
            'judge("test-time-gradient", 0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[gradient_at_test_time]",
        ),
        (
            "engine/evaluation/verify.py",
            "BATCHES = (1, 7, 64)",
            "BATCHES = (64, 64, 64)",
            "test_blocks.py::test_who_is_right_in_one_batch_only_does_not_stand",
        ),
    ),
    *_of(
        "An example counts in the ball and the box alone, in float64, at every batch size",
        (
            "engine/evaluation/verify.py",
            "finite & boxed & (distance <= allowed)",
            "finite & (distance <= allowed)",
            "test_blocks.py::test_the_last_bit_of_the_box_counts",
        ),
        (
            "engine/evaluation/verify.py",
            "    distance = norms(wide - x.cpu().double(), norm=norm)",
            "    distance = norms(points.cpu() - x.cpu(), norm=norm)",
            "test_blocks.py::test_the_edge_of_the_ball_is_measured_in_float64",
        ),
        (
            "engine/evaluation/verify.py",
            "finite & boxed & (distance <= allowed)",
            "finite & boxed",
            "test_blocks.py::test_verification_in_float64",
        ),
        (
            "engine/evaluation/audit.py",
            'judge("eps-zero", moved,',
            'judge("eps-zero", 0,',
            "test_zoo.py::test_an_attack_that_moves_images_without_a_radius_is_seen",
        ),
        (
            "commands/transfer.py",
            "    return flags.audit or flags.strict\n",
            "    return flags.audit\n",
            "test_attack_command.py::test_strict_makes_the_audit",
        ),
    ),
    *_of(
        "No link below a run is followed, and a folder is replaced only where all in it is ours",
        (
            "store/files.py",
            "os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW",
            "os.O_RDWR | os.O_CREAT | os.O_APPEND",
            "test_store.py::test_streams_and_cuts_follow_no_link",
        ),
        (
            "store/runs.py",
            "next(kinds, None) or next(links_below(run.path), None)",
            "next(kinds, None)",
            "test_store.py::test_no_link_below_a_run_is_followed",
        ),
        (
            "store/runs.py",
            "next(kinds, None) or next(links_below(run.path), None)",
            "next(links_below(run.path), None)",
            "test_store.py::test_no_item_is_held_by_way_of_a_linked_folder",
        ),
        (
            "commands/export.py",
            "    if strange := _strange(target):\n",
            "    if strange := None:\n",
            "test_export.py::test_force_replaces_nothing_but_what_an_export_wrote",
        ),
    ),
    *_of(
        "Changed bytes of packs, records that contradict themselves and changed lines of metrics are noticed",
        (
            "engine/data/packs.py",
            "            if _is_whole(pack, pixels):\n",
            "            if True:\n",
            "test_data.py::test_a_pack_whose_content_changed_is_made_again",
        ),
        (
            "store/records.py",
            "        if told != [own if own[1] else None for own in by_class]:\n",
            "        if False:\n",
            "test_records.py::test_a_probe_that_contradicts_itself_is_no_record",
        ),
        (
            "store/records.py",
            "        if self.sha256 not in (None, self._digest()):\n",
            "        if False:\n",
            "test_measures.py::test_samples_that_contradict_themselves_are_left_alone",
        ),
        (
            "store/records.py",
            "        if _digest(data) != seal[1].decode():\n",
            "        if False:\n",
            "test_records.py::test_no_flipped_bit_of_a_record_is_taken_for_its_word",
        ),
        (
            "store/files.py",
            '            if at["sha256"] not in (None, _sha256(descriptor, size).hexdigest()):\n',
            "            if False:\n",
            "test_files.py::test_json_lines_round_trip_and_cut",
        ),
        (
            "commands/pretrain.py",
            "    _require_own(run.recipe(), run.resolved_json, run)\n",
            "",
            "test_process_runs.py::test_what_was_changed_in_a_cut_run_is_not_gone_on_from",
        ),
    ),
    *_of(
        "Strangers' weights cannot run, hang or fill the memory",
        (
            "engine/heads/foreign_file.py",
            "        if not stat.S_ISREG(status.st_mode):\n",
            "        if False:\n",
            "test_imported.py::test_what_is_no_file_is_refused_at_once",
        ),
        (
            "engine/heads/foreign_file.py",
            "        if unpacked > _most(size):\n",
            "        if False:\n",
            "test_imported.py::test_a_zip_that_unpacks_to_gigabytes_is_refused_before",
        ),
        (
            "engine/heads/foreign_file.py",
            "                if kind := _unfit(value):\n",
            "                if kind := None:\n",
            "test_imported.py::test_what_is_no_plain_tensor_is_named",
        ),
        (
            "engine/heads/foreign_file.py",
            "    _limit(os.fstat(file.fileno()).st_size)\n",
            "",
            "test_imported.py::test_a_file_is_opened_in_its_process",
        ),
        (
            "engine/heads/foreign_file.py",
            " and depth < _DEPTH",
            "",
            "test_imported.py::test_tables_within_tables_are_followed_so_far_and_no_further",
        ),
    ),
    *_of(
        "A terminal that closes saves; a plan beyond the memory is not begun; checkpoints come by time too",
        (
            "commands/common.py",
            ", signal.SIGHUP: ExitCode.HUNG_UP}",
            "}",
            "test_process_signals.py::test_a_signal_saves_the_batch_under_way",
        ),
        (
            "commands/pretrain.py",
            "    if there is None or needed <= there or ",
            "    if True or ",
            "test_ledger.py::test_what_is_beyond_the_memory_is_not_begun",
        ),
        (
            "engine/pretrain.py",
            "        if signal or due:\n",
            "        if signal:\n",
            "test_pretrain.py::test_a_checkpoint_comes_when_the_last_is_long_ago",
        ),
    ),
    *_of(
        "What a user may not read is named and left out",
        (
            "comparison/gather.py",
            "        except OSError as error:\n            self._leave_out(",
            "        except ZeroDivisionError as error:\n            self._leave_out(",
            "test_compare_command.py::test_what_may_not_be_read_is_left_out",
        ),
    ),
    *_of(
        "Cheats that a few passes do not show are found by the audit",
        *(
            ("engine/evaluation/audit.py", f'judge("{name}", {figure},', f'judge("{name}", 0.0,', test)
            for name, figure, test in (
                ("gradient", "share", "test_zoo.py::test_a_cheat_raises_its_flag[negated_gradient]"),
                ("leap", "share", "test_zoo.py::test_a_cheat_raises_its_flag[flat]"),
                ("radius", "float(leaps.median())", "test_zoo.py::test_a_cheat_raises_its_flag[shrinking]"),
                (
                    "between",
                    "float(leap_between(self.predict, self.x).median())",
                    "test_zoo.py::test_a_cheat_raises_its_flag[normalised]",
                ),
                ("memory", "int(other.sum())", "test_zoo.py::test_a_cheat_raises_its_flag[remembers]"),
                (
                    "drift",
                    "float(apart(early, late).amax())",
                    "test_zoo.py::test_a_cheat_raises_its_flag[hardens_later]",
                ),
                ("search", "int(other.sum())", "test_zoo.py::test_a_cheat_raises_its_flag[another_search]"),
                (
                    "logit-gap",
                    "share(gap > _WIDE_GAP)",
                    "test_zoo.py::test_a_cheat_raises_its_flag[just_below_the_scale]",
                ),
                ("temperature", "float(unsure.sum()) / n", "test_zoo.py::test_a_cheat_raises_its_flag[temperature]"),
                ("ratio-tied", "float(tied.sum()) / n", "test_zoo.py::test_a_cheat_raises_its_flag[compressed]"),
            )
        ),
        (
            "engine/evaluation/audit.py",
            '"rounding",\n                int(new.sum()),',
            '"rounding",\n                0,',
            "test_zoo.py::test_a_cheat_raises_its_flag[honest_on_the_grid]",
        ),
    ),
)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the package, its recipes and its tests, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="cfamc-protections-") as folder:
        for name in ("cfamc_cli", "recipes", "tests", ".github"):
            unwanted = shutil.ignore_patterns("__pycache__", "benchmarks")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=unwanted)
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, folder)
        yield Path(folder)


def notices(protection: Protection, copy: Path) -> tuple[bool, str]:
    """Whether the test fails without the protection, and how it ended.

    Raises:
        ValueError: As for `taken_out`; or the test could not be run.
    """
    path, said = copy / "cfamc_cli" / protection.file, copy / "said"
    whole, without = protection.taken_out(copy / "cfamc_cli")
    path.write_text(without, encoding="utf-8")
    child = os.fork()
    if child == 0:
        _become_the_test(protection.test, copy, said)
    until = time.monotonic() + SECONDS
    try:
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True, f"hangs for {SECONDS} s"
            time.sleep(0.05)
    finally:
        path.write_text(whole, encoding="utf-8")
    code, text = os.waitstatus_to_exitcode(ended[1]), said.read_text(encoding="utf-8", errors="replace").strip()
    if code not in (0, 1):  # of pytest: all passed, some failed; else nothing was tested
        raise ValueError(f"{protection.test} cannot be run without: {protection.text!r}\n{text[-2000:]}")
    return code == 1, text.rpartition("\n")[2]


def _become_the_test(test: str, copy: Path, said: Path) -> NoReturn:
    """Run one test of the copy in this process, which knows the libraries and none of cfamc yet."""
    os.setsid()
    os.chdir(copy)
    streams = [(os.devnull, os.O_RDONLY), (str(said), os.O_RDWR | os.O_CREAT | os.O_TRUNC)]
    for number, (name, flags) in enumerate(streams):
        os.dup2(os.open(name, flags, 0o666), number)
    os.dup2(1, 2)
    os.environ["PYTHONPATH"] = str(copy)  # of processes that tests start
    sys.path[0] = str(copy)  # in place of tests/ of the checkout
    code: int = 2
    try:
        code = pytest.main(
            ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={copy}", f"tests/{test}"]
        )
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(words: list[str]) -> int:
    """Take out what was asked for, print a line of each, and return how many were not noticed."""
    assert "cfamc_cli" not in sys.modules, "the package is to come from the copy"
    missed = 0
    chosen = [one for one in TABLE if not words or any(word in f"{one.promise} {one.test}" for word in words)]
    if words == ["--sample"]:
        chosen = random.Random(0).sample(TABLE, SAMPLE)
    with copied() as copy:
        for one in chosen:
            began = time.monotonic()
            try:
                red, said = notices(one, copy)
            except ValueError as error:  # the others are tried all the same
                red, said = False, str(error)
            missed += not red
            print(f"{'red' if red else 'NOT NOTICED'}  {one.test}  {time.monotonic() - began:.0f} s")
            print(f"     {one.promise}\n     without {one.text.strip()!r} in {one.file}: {said}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
