"""What a user of the rl-rock SDK does, against an admin of ours. Runs in an interpreter that has rl-rock:
`python peer_sdk.py URL KEY DIRECTORY`. The last line of its output names what has passed."""

import asyncio
import json
import os
import sys
import warnings
from pathlib import Path

from rock.actions import (
    BashAction,
    CloseSessionRequest,
    Command,
    CreateBashSessionRequest,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from rock.actions.sandbox.response import CommitPhase, State
from rock.sdk.common.exceptions import BadRequestRockError
from rock.sdk.envs import make
from rock.sdk.sandbox.client import Sandbox, SandboxGroup
from rock.sdk.sandbox.config import SandboxConfig, SandboxGroupConfig

URL, KEY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
SIZE = {"memory": "256m", "cpus": 1, "startup_timeout": 120}


def config(kind=SandboxConfig, **more):
    headers = {"XRL-Authorization": f"Bearer {KEY}"}
    return kind(base_url=URL, extra_headers=headers, **{**SIZE, **more})


async def raises(awaitable, kind=Exception, text=""):
    (raised,) = await asyncio.gather(awaitable, return_exceptions=True)
    assert isinstance(raised, kind), f"expected {kind.__name__}, got {raised!r}"
    assert text in str(raised), str(raised)


async def life():
    plain = Sandbox(SandboxConfig(base_url=URL, extra_headers={"Authorization": f"Bearer {KEY}"}))  # 8g, 50G, 2 CPUs
    await plain.start()
    assert (await plain.execute(Command(command=["echo", "well"]))).stdout == "well\n"
    await plain.close()
    box = Sandbox(config(experiment_id="exp-1"))
    await box.start()
    assert (await box.is_alive()).is_alive
    again = Sandbox(config())
    await again.attach(box.sandbox_id)
    assert again.config.memory == "256m"
    assert again.config.experiment_id == "exp-1"
    status = await box.get_status(include_all_states=True)
    assert status.state is State.RUNNING
    assert len(status.state_history) == 3
    await box.stop()
    assert not await box.is_alive()
    assert (await box.get_status()).state is State.STOPPED
    await box.delete()
    group = SandboxGroup(config(SandboxGroupConfig, size=2))
    await group.start()
    assert len({each.sandbox_id for each in group.sandbox_list}) == 2
    await group.stop()


async def commands(box):
    result = await box.execute(Command(command=["sh", "-c", "echo out; echo err >&2; exit 3"]))
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")
    await box.create_session(CreateBashSessionRequest(session="s", env_enable=True, env={"A": "b"}))
    observation = await box.run_in_session(BashAction(session="s", command="cd /tmp; X=5; echo $A"))
    assert (observation.exit_code, observation.output) == (0, "b")
    assert (await box.arun("echo $X $PWD", session="s")).output == "5 /tmp"
    assert (await box.arun("echo alone")).output == "alone"
    slow = await box.arun("bash -c 'sleep 2; echo late'", mode="nohup", wait_timeout=60, wait_interval=5)
    assert (slow.exit_code, slow.output.strip()) == (0, "late"), slow
    await box.close_session(CloseSessionRequest(session="s"))
    await raises(box.arun("true", session="s"), text="does not exist")


async def files(box):
    assert (await box.write_file(WriteFileRequest(content="ü\n", path="/tmp/d/f"))).success
    assert (await box.read_file(ReadFileRequest(path="/tmp/d/f"))).content == "ü\n"
    assert (await box.read_file_by_line_range("/tmp/d/f")).content == "ü\n"
    local = FOLDER / "blob.bin"
    local.write_bytes(os.urandom(2 << 20))  # more than the SDK would rather send to an object store
    answer = await box.upload(UploadRequest(source_path=str(local), target_path="/tmp/up/blob.bin"))
    assert answer.success, answer
    size = await box.execute(Command(command=["stat", "-c", "%s", "/tmp/up/blob.bin"]))
    assert size.stdout == f"{2 << 20}\n"
    tree = FOLDER / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "a.txt").write_text("in a tree\n")
    observation = await box.fs.upload_dir(tree, "/tmp/tree")
    assert observation.exit_code == 0, observation
    assert (await box.read_file(ReadFileRequest(path="/tmp/tree/sub/a.txt"))).content == "in a tree\n"


async def commit(box):
    status = await box.commit("registry.example/sdk:1", "user", "password")
    assert status.phase is CommitPhase.SUCCEEDED
    assert (await box.get_commit_status()).image_tag == "registry.example/sdk:1"
    copy = Sandbox(config(image="registry.example/sdk:1"))
    await copy.start()
    assert (await copy.read_file(ReadFileRequest(path="/tmp/d/f"))).content == "ü\n"
    await copy.stop()


async def faults(box):
    """What the SDK makes of our errors: exceptions that say why, never a success."""
    await raises(Sandbox(config(image="nobody/knows")).start(), BadRequestRockError, "one of the admin's images")
    await raises(box.read_file(ReadFileRequest(path="/tmp/nowhere")), text="404")
    assert not (await box.write_file(WriteFileRequest(content="", path="/proc/x"))).success
    await box.create_session(CreateBashSessionRequest(session="f"))
    await raises(box.create_session(CreateBashSessionRequest(session="f")), text="exists already")
    await raises(box.arun("echo why; (exit 3)", session="f"), text="exit code 3; output: why")
    timeout = await box.execute(Command(command="echo begun; sleep 60", timeout=1))
    assert (timeout.exit_code, timeout.stdout) == (124, "begun\n")
    stranger = Sandbox(SandboxConfig(base_url=URL, **SIZE))
    await raises(stranger.start(), text="401")


def gem():
    env = make("sdk@1")
    observation, info = env.reset(seed=3)
    assert observation
    assert isinstance(info, dict)
    observation, reward, terminated, truncated, _ = env.step("echo hello")
    assert ("hello" in observation, reward, terminated, truncated) == (True, 0.0, False, False)
    env.close()


async def main():
    passed = []
    await life()
    passed.append("life")
    box = Sandbox(config())
    await box.start()
    for part in (commands, files, commit, faults):
        await part(box)
        passed.append(part.__name__)
    await box.close()
    await asyncio.to_thread(gem)
    print(json.dumps({"passed": [*passed, "gem"]}))


warnings.simplefilter("ignore")
asyncio.run(main())
