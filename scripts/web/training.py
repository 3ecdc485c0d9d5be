"""The training page: live curves of the runs, and a form that starts one."""

import os
import shlex
import socket
from base64 import b64encode
from contextlib import suppress
from html import escape
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import streamlit as st

from model.errors import UserError
from scripts.web.controls import persistent
from scripts.web.processes import STOP, Process, last_lines
from scripts.web.texts import Translator
from scripts.web.training_curves import show_curves
from scripts.web.training_form import continue_run, resume_flags, training_form
from scripts.web.training_runs import (
    FoundRun,
    WatchedRun,
    find_reports,
    find_runs,
    watch,
)
from trainer.report.plots import LINES
from trainer.report.run_state import RunState

INTERVAL = 2  # seconds between two looks at the logs
ROWS = 8  # of the list of runs, before all are asked for
STYLE = """<style>
.mm-run {display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center; font-size: .9rem;
  font-variant-numeric: tabular-nums}
.mm-run > span {white-space: nowrap}
.mm-state {border-radius: 1rem; padding: .05rem .6rem; font-size: .8rem;
  background: color-mix(in srgb, var(--mm) 16%, transparent); border: 1px solid
  color-mix(in srgb, var(--mm) 45%, transparent)}
.mm-running {--mm: #3b82f6} .mm-finished {--mm: #22a67a} .mm-stopped {--mm: #d9a514}
.mm-died {--mm: #e0475b} .mm-running::before {content: "● "; color: var(--mm);
  animation: mm-pulse 2s infinite}
@keyframes mm-pulse {50% {opacity: .25}}
.mm-bar {display: inline-block; width: 9rem; height: .45rem; border-radius: .3rem;
  background: color-mix(in srgb, currentColor 14%, transparent); overflow: hidden}
.mm-bar > i {display: block; height: 100%; background: #3b82f6}
.mm-dot {display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .35rem; vertical-align: baseline}
.mm-soft {opacity: .7}
[data-stale="true"] {opacity: 1 !important} /* no fading at each look where the machine is busy */
.mm-samples {width: 100%; border-collapse: collapse}
.mm-samples td {vertical-align: top; padding: .3rem .9rem .3rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent)}
.mm-samples td:first-child {white-space: pre; opacity: .7; font-size: .85rem; width: 7rem}
</style>"""


def training_page(args: Any, t: Translator) -> None:
    st.html(STYLE)
    st.title(t("training_page"))
    st.session_state.setdefault("training_view", "runs")
    if "next_view" in st.session_state:  # the control itself must not exist yet in this run
        st.session_state.training_view = st.session_state.pop("next_view")
    views = {"runs": ":material/monitoring: ", "new_training": ":material/add_circle: "}
    view = st.segmented_control(
        "view",
        list(views),
        format_func=lambda name: views[name] + t(name),
        required=True,
        label_visibility="collapsed",
        **persistent("training_view"),
    )
    if view == "runs":
        show_runs(args, t)
    elif may_control(args):
        training_form(args, t, on_start=started)
    else:
        st.info(t("read_only"), icon=":material/lock:")


def may_control(args: Any) -> bool:
    """Whether this visitor may start and stop trainings: those of other machines only if
    --remote_training says so, for a trainer's flags name files to read and to write."""
    address = st.context.ip_address  # of the connection itself; None for localhost
    return args.remote_training or address is None or ip_address(address).is_loopback


@st.cache_resource
def launches() -> list[Process]:
    """What the page has started and nobody has seen the first step of yet."""
    return []


def started(process: Process) -> None:
    """Go to the list of runs, where the new one is going to appear."""
    launches().append(process)
    st.session_state.setdefault("started", set()).add(process.popen.pid)
    st.session_state.next_view = "runs"
    st.rerun()


# -- the runs --------------------------------------------------------------------------------------


@st.fragment(run_every=INTERVAL)
def show_runs(args: Any, t: Translator) -> None:
    """The list of runs, the curves of those that are chosen, and details of each."""
    folders = tuple(str(Path(folder)) for folder in (args.save_dir, *args.runs_dir))
    found = find_runs(folders)
    show_launches([watch(run) for run in found[:ROWS]], t)
    if not found and not launches():
        st.info(t("no_runs", folders=", ".join(f"`{folder}`" for folder in folders)))
    chosen = choose_runs(found, t)
    if chosen:
        show_curves(chosen, t)
        tabs = st.tabs([run.run.label for run in chosen])
        for tab, run in zip(tabs, chosen, strict=True):
            with tab:
                show_details(run, args, t)
    if reports := find_reports(folders):
        st.subheader(t("reports"))
        for page in reports:
            show_report(page, f"{page.parent.name}/{page.name}", f"report {page}")


def show_launches(runs: list[WatchedRun], t: Translator) -> None:
    """What was started here and has no log yet: its output, and why it ended, if it did."""
    for run in runs:
        run.refresh()
    seen = {run.state.pid for run in runs if run.state}
    for process in [*launches()]:
        if process.popen.pid in seen:
            launches().remove(process)
            continue
        name = Path(process.argv[0]).name
        lines = last_lines(process.output)
        if process.running:
            st.info(t("start_pending", name=name), icon=":material/hourglass_top:")
            st.code(lines or "…", language=None)
            continue
        st.error(t("start_failed", name=name), icon=":material/error:")
        st.code(lines, language=None, wrap_lines=True)
        key = f"dismiss {process.popen.pid}"
        if st.button(t("dismiss"), key=key, icon=":material/close:"):
            launches().remove(process)
            st.rerun(scope="fragment")


def choose_runs(found: list[FoundRun], t: Translator) -> dict[WatchedRun, str]:
    """The runs that are ticked in the list, at first those that run or the latest one, and the
    color of each, which it keeps."""
    rows = found if st.session_state.get("all_runs") else found[:ROWS]
    runs = [watch(run) for run in rows]
    for run in runs:
        run.refresh()
    running = [run for run in runs if run.status == "running"]
    seen = st.session_state.setdefault("seen_runs", set())
    started_here = st.session_state.get("started", set())
    first = (running or runs[:1]) if not seen else []
    colors = st.session_state.setdefault("run_colors", {})
    chosen: dict[WatchedRun, str] = {}
    for run in runs:
        key = f"show {run.run.log}"
        # a run that begins while one looks is shown at once; a short one has ended by now
        ours = run.state is not None and run.state.pid in started_here
        begins = (run.status == "running" or ours) and run.run.log not in seen
        seen.add(run.run.log)
        if key not in st.session_state and (run in first or begins):
            st.session_state[key] = True
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            log = run.run.log
            free = [color for color in LINES if color not in colors.values()]
            full = not free and log not in colors
            ticked = st.checkbox(run.run.label, disabled=full, width="content", **persistent(key))
            if ticked and not full:
                chosen[run] = colors.setdefault(log, *free[:1])
            else:
                colors.pop(log, None)
            st.html(run_line(run, chosen.get(run, ""), t))
    if len(found) > ROWS:
        st.toggle(t("more_runs", count=len(found)), key="all_runs")
    if found and not chosen:
        st.caption(t("choose_runs"))
    return chosen


def run_line(run: WatchedRun, color: str, t: Translator) -> str:
    """State, progress and the latest metrics of a run in a line of HTML."""
    parts = [f'<i class="mm-dot" style="background: {color}"></i>'] if color else []
    if run.status:
        name = t("stopped_run" if run.status == "stopped" else run.status)
        parts.append(f'<span class="mm-state mm-{run.status}">{name}</span>')
    if state := run.state:
        share = min(1.0, state.step / max(1, state.total_steps))
        parts.append(f'<span class="mm-bar"><i style="width: {share:.1%}"></i></span>')
        parts.append(f"<span>{t('steps_of', step=state.step, total=state.total_steps)}</span>")
        if (left := state.seconds_left) is not None:
            parts.append(f"<span>{t('time_left', time=short_time(left, t))}</span>")
    elif run.last:
        parts.append(f"<span>{t('step_at', step=run.last['step'])}</span>")
    for metric in ("loss", "eval_bpb", "reward", "kl"):
        value = run.last.get(metric)
        if isinstance(value, int | float):
            name = t(f"curve_{metric}") if metric != "eval_bpb" else t("bpb")
            parts.append(f'<span class="mm-soft">{name} <b>{value:.3f}</b></span>')
    return f'<div class="mm-run">{"".join(parts)}</div>'


def short_time(seconds: float, t: Translator) -> str:
    if seconds < 100:
        return t("seconds_short", n=seconds)
    return (
        t("minutes_short", n=seconds / 60) if seconds < 6000 else t("hours_short", n=seconds / 3600)
    )


# -- details ---------------------------------------------------------------------------------------


def show_details(run: WatchedRun, args: Any, t: Translator) -> None:
    """Stop and continue, samples, output, command line and report of a run."""
    key = str(run.run.log)
    if run.error:
        st.error(run.error)
    if run.state and may_control(args):
        control_run(run, run.state, args, t)
    output = Path(run.state.output) if run.state and run.state.output else None
    lines = last_lines(output, 12) if output else ""
    died = run.status == "died"
    if died:
        errors = [line for line in lines.split("\n") if line.startswith("error: ")]
        st.error(errors[-1] if errors else t("died_silently"), icon=":material/error:")
    with st.expander(t("samples"), icon=":material/notes:", expanded=True):
        show_samples(run, t)
    with st.expander(t("output"), icon=":material/terminal:", expanded=died):
        if lines:
            st.code(lines, language=None)
        else:
            st.caption(t("no_output"))
    with st.expander(t("command"), icon=":material/code:"):
        if run.state:
            st.code(f"python {shlex.join(run.state.argv)}", language="bash", wrap_lines=True)
        else:
            st.caption(t("no_command"))
    report = run.run.beside(".report.html")
    if report.exists():
        show_report(report, t("report"), f"report {key}")


def control_run(run: WatchedRun, state: RunState, args: Any, t: Translator) -> None:
    """A button that stops a run, or that continues it."""
    key = str(run.run.log)
    if state.state == "running":
        if state.host != socket.gethostname():
            st.caption(t("other_machine", host=state.host))
            return
        stopping = st.session_state.get(f"stopping {key}") == state.pid
        icon = ":material/stop_circle:"
        if st.button(t("stop_run"), key=f"stop {key}", icon=icon, disabled=stopping):
            # as Ctrl-C: the step in progress ends, and the checkpoint is saved
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(state.pid, STOP)
            st.session_state[f"stopping {key}"] = state.pid
            st.rerun(scope="fragment")
        if stopping:
            st.caption(t("stopping"))
    elif state.state in ("stopped", "died"):
        pending = any(process.running for process in launches())
        possible = resume_flags(state) is not None
        icon = ":material/resume:"
        if st.button(
            t("continue_run"), key=f"continue {key}", icon=icon, disabled=pending or not possible
        ):
            try:
                launches().append(continue_run(state, str(run.run.log.parent)))
            except UserError as error:
                st.error(error)
                return
            st.rerun(scope="fragment")
        if not possible:
            st.caption(t("cannot_continue"))


def show_samples(run: WatchedRun, t: Translator) -> None:
    """The model's text over time, the latest first."""
    rows = []
    for record in run.samples_shown():
        where = t("step_at", step=record["step"])
        if (bits := record.get("eval_bpb")) is not None:
            where += f"\n{bits:.3f} bpb"
        rows.append(f"<tr><td>{where}</td><td>{escape(record['sample'].strip())}</td></tr>")
    if rows:
        with st.container(height=300 if len(rows) > 3 else "content", border=False):
            st.html(f'<table class="mm-samples">{"".join(rows)}</table>')
    else:
        st.caption(t("no_samples"))


def show_report(page: Path, title: str, key: str) -> None:
    """A switch that shows a report page here."""
    if st.toggle(title, key=key):
        content = b64encode(page.read_bytes()).decode()
        # as a data: address it has an origin of its own, and no access to this page
        st.iframe(f"data:text/html;charset=utf-8;base64,{content}", height=900)
