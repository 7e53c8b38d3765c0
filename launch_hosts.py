"""Start a run on every host of a DeepSpeed hostfile, watch it from here, and start it again when a host is lost.

    python launch_hosts.py --hostfile=hostfile train_deepspeed.py config/train_gpt2_deepspeed_zero2.py
    HOSTFILE=hostfile ./launch_deepspeed_zero2.sh --restarts=5 config/train_gpt2.py --resume=auto

Each host runs launch.py, reached by ssh without a password, in this folder and with this Python. A word goes to each
every second: where it stops coming, the ranks end themselves, so that nothing stays behind on a host out of reach.
"""

import argparse
import os
import signal
import sys
import time

from training import ending, hostfile, hosts
from training.errors import LOST, STOPPED, UserError
from training.hostfile import Host
from training.hosts import Node

WORD = 1.0  # seconds between two words to each host
GRACE = 12.0  # seconds that the others get to end by themselves after the first has failed
PATIENCE = 40.0  # and then until they are given up: launch.py takes up to 20 to kill its ranks
SSH_LOST = 255
FINAL = (0, 2, STOPPED)  # no restart mends these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", default="hostfile", help="a line a host: NAME slots=RANKS")
    parser.add_argument("--include", default="", help="only these: host1@host2:0,1 (all slots, or those named)")
    parser.add_argument("--exclude", default="", help="not these; written as --include")
    parser.add_argument("--ssh", default="ssh", help="with its options: 'ssh -p 2222 -i key -l user'")
    parser.add_argument("--restarts", type=int, default=0, help="times to start again, on the hosts that are left")
    parser.add_argument("--master_addr", default="", help="of the first host, as the others reach it")
    parser.add_argument("--master_port", type=int, default=0, help="free there; default: one that is")
    parser.add_argument("--write_env", help="write what travels to the other hosts for deepspeed --hostfile, and end")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="SCRIPT [ARGUMENTS]")
    args = parser.parse_args()
    if args.write_env:
        return hosts.write_environment(args.write_env, os.environ)
    if not args.command:
        raise UserError("no script; write python launch_hosts.py --hostfile=FILE SCRIPT [ARGUMENTS]")
    signals: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    wanted, travels = hostfile.read(args.hostfile, args.include, args.exclude), hosts.environment(os.environ)
    found = hosts.look(wanted, args.ssh, args.master_port)
    hosts.check(wanted, found)
    for again in range(args.restarts + 1):
        status = run(wanted, found, args, travels, signals)
        if status in FINAL or signals or again == args.restarts:
            sys.exit(status)
        found = hosts.look(wanted, args.ssh)
        wanted = [host for host in wanted if not isinstance(found[host.name], str)]
        if not wanted:
            raise UserError("no host of the hostfile answers; nothing to start again on")
        if "--resume=auto" not in args.command:
            args.command.append("--resume=auto")
        names = ", ".join(host.name for host in wanted)
        print(f"launch_hosts.py: restart {again + 1} of {args.restarts}, on {names}", flush=True)


def run(wanted: list[Host], found: dict, args: argparse.Namespace, travels: dict[str, str], signals: list[int]) -> int:
    """One start on all hosts, until the last has ended; the status of the one that failed first."""
    address = hosts.master(wanted, found, args.master_addr)
    port = args.master_port or found[wanted[0].name]["port"]
    nodes = hosts.start(wanted, found, args.ssh, (address, port), travels, args.command)
    return watch(nodes, signals)


def watch(nodes: list[Node], signals: list[int]) -> int:
    failed, code, since, spoken, passed = nodes[0], 0, 0.0, 0.0, 0
    while True:
        now, codes = time.monotonic(), {node: node.process.poll() for node in nodes}
        ended = sorted((n for n in nodes if codes[n]), key=lambda node: codes[node] == LOST)
        if ended and (not code or code == LOST != codes[ended[0]]):  # who lost another rank is not the cause
            failed, code, since = ended[0], codes[ended[0]] or 0, since or now
        if None not in codes.values():
            break
        if now > spoken + WORD:
            spoken = now
            for node in nodes:
                node.say(0)
        for signum in signals[passed:]:
            for node in nodes:
                node.say(signum)
        passed = len(signals)
        if code and now > since + GRACE:
            for node in nodes:
                node.drop()
        if code and now > since + GRACE + PATIENCE:
            for node in nodes:
                node.process.kill()
        time.sleep(0.05)
    if code and code not in FINAL:
        how = "the connection was lost" if code == SSH_LOST else f"ended with status {code}"
        print(f"launch_hosts.py: {failed.host.name}: {how}", file=sys.stderr)
    return LOST if code < 0 or code == SSH_LOST else code


if __name__ == "__main__":
    ending.run(main)
