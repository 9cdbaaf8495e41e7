r"""Project the CT series that arrive at an Orthanc server, and store the results there.

    ORTHANC_USER=node ORTHANC_PASSWORD=... python -m pacs --model models/head-128 --orthanc http://127.0.0.1:8042 \
        --state state

Follows Orthanc's change log for stable CT series, fetches, projects and stores them back as DICOM objects of the same
study, and serves a worklist: /, /worklist.json, /healthz, /metrics. May be killed at any time: every series gets one
set of results. Runs until it is stopped, after the series in work (a second Ctrl-C: at once). Exit codes: 130 stopped
by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP; 2 for wrong usage, and where Orthanc redirects, or does not allow to read,
store or delete. docs/PACS.md tells more. Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from datetime import datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import distributed
from common.stopping import SIGNALS, orderly_end
from common.time_zone import check_time_zone
from detect import Projector, load_bundle
from detect.dicom_out import identity_of
from op import memory, set_impl
from pacs.node import POLL_S, QUEUE, Node
from pacs.orthanc import TIMEOUT_S, Orthanc, OrthancRefused, checked_url
from pacs.server import DAYS, serve
from pacs.state import State, StateError

DAY_S = 86_400


class NoPhi(argparse.Action):
    """Of projector.py; here it would hide the results."""

    def __call__(self, parser, *_) -> None:
        parser.error("--no-phi: Orthanc would file results without a PatientID under a patient of their own, where "
                     "nobody who opens the CT sees them, and they would stay when its study is deleted; leave it out: "
                     "the archive holds the patient data already. For results to give away: projector.py --no-phi")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pacs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model bundle made by latent_stats.py")
    add("--orthanc", required=True, metavar="URL", help="Orthanc's address; user and password come from the "
        "environment: ORTHANC_USER, ORTHANC_PASSWORD")
    add("--state", type=Path, required=True, help="folder in which the node remembers what it has done")
    add("--host", default="127.0.0.1", help="address that the pages are served on (default: %(default)s)")
    add("--port", type=int, default=8043, help="of the pages (default: %(default)s)")
    add("--link", metavar="URL", help="Orthanc's address for the links on the page (default: that of --orthanc)")
    add("--queue", type=int, default=QUEUE,
        help="series that may wait, the rest stays in the log (default: %(default)s)")
    add("--poll-s", type=float, default=POLL_S, help="seconds between looks at the change log (default: %(default)g)")
    add("--timeout-s", type=float, default=TIMEOUT_S,
        help="seconds to wait for Orthanc's answers (default: %(default)g)")
    add("--since", default="beginning", choices=("beginning", "now"), help="of Orthanc's change log: where a new "
        "--state starts; now passes over what is in the archive already (default: %(default)s)")
    add("--withdraw-deleted", action="store_true", help="delete results, too, where their series is deleted by "
        "itself after they were stored; without this they stay")
    add("--days", type=float, default=DAYS, help="of finished series that the pages show, the older ones are counted "
        "(default: %(default)g)")
    add("--no-phi", action=NoPhi, nargs=0, help=argparse.SUPPRESS)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the networks (default: bf16 where the device is good at it)")
    args = parser.parse_args(argv)
    for flag, most in (("queue", 10**6), ("poll_s", DAY_S), ("timeout_s", DAY_S), ("days", 36_500)):
        if not 0 < getattr(args, flag) <= most:
            parser.error(f"--{flag.replace('_', '-')} must be above 0 and at most {most}, got {getattr(args, flag):g}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be from 0, which takes a free one, to 65535, got {args.port}")
    if not args.host:
        parser.error("--host is empty, which would serve the pages on all addresses; give one, such as 127.0.0.1")
    return args


def credentials() -> tuple[str | None, str | None]:
    """User and password from the environment, or neither. Raises ValueError for one without the other."""
    user, password = (os.environ.get(name) or None for name in ("ORTHANC_USER", "ORTHANC_PASSWORD"))
    if (user is None) != (password is None):
        raise ValueError("ORTHANC_USER and ORTHANC_PASSWORD: set both in the environment, or neither")
    return user, password


def start(args: argparse.Namespace) -> tuple[Node, ThreadingHTTPServer]:
    """The node, and the server of its pages. Raises OSError and ValueError, with what is wrong and its mend."""
    check_time_zone()
    orthanc = Orthanc(args.orthanc, *credentials(), args.timeout_s)
    link = None if args.link is None else checked_url("--link", args.link)
    memory.keep_freed()
    set_impl(args.ops)
    projector = Projector(load_bundle(args.model, distributed.pick_device(args.device), args.precision))
    state = State(args.state, projector.key())
    node = Node(orthanc, state, projector, identity_of(projector), queue=args.queue, poll_s=args.poll_s,
                from_now=args.since == "now", withdraw_deleted=args.withdraw_deleted)
    try:
        return node, serve(node, args.host, args.port, link, args.days)
    except (OSError, UnicodeError) as error:          # the latter of a host that is no name
        raise ValueError(f"--host {args.host} --port {args.port}: the pages cannot be served there "
                         f"({getattr(error, 'strerror', None) or 'no host name'}); choose others") from error


def run(node: Node) -> int:
    """Until SIGINT, SIGTERM or SIGHUP, of which the exit code tells: after the series in work; a second Ctrl-C at once.

    Raises OrthancRefused, StateError, and KeyboardInterrupt at a second Ctrl-C.
    """
    got: list[int] = []

    def stop(number: int, frame: object) -> None:
        if number == signal.SIGINT and got:
            raise KeyboardInterrupt
        got.append(number)
        # In a thread of its own: this may have interrupted the loop while it holds the event's lock
        Thread(target=node.stopping.set).start()

    for number in (signal.SIGINT, *SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN:                 # as under nohup
            signal.signal(number, stop)
    node.run()
    return 128 + got[0]


@orderly_end()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        node, server = start(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    host, port = server.server_address[:2]
    offset = datetime.now().astimezone().isoformat(timespec="minutes")[-6:]             # +09:00
    print(f"worklist: http://{host}:{port}/ (projects on {distributed.pick_device(args.device)}, dates results "
          f"{offset})", flush=True)
    try:
        return run(node)
    except (OrthancRefused, StateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the series in work is done at the next start", file=sys.stderr)
        return 130
    finally:
        server.shutdown()
        node.state.close()


if __name__ == "__main__":
    sys.exit(main())
