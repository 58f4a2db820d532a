"""The ledger of an agent that repeats, forks, edits and replaces its history: nothing is re-rendered, nothing lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.models import ChatRenderer, Message, train_tokenizer
from rome.rollout import Finish, LedgerError, MessageTree, Sampled
from rome.trajectory import Status, Task

TASK = Task(id="t", instruction="do it")
RENDERER = ChatRenderer(train_tokenizer(["ls cat notes.txt done yes no system prompt summary of the work"], 300))


def user(text):
    return Message("user", text)


def tool(text):
    return Message("tool", text)


def say(tree, turn, command=None, text="", version=0):
    """What a policy would have sampled, token by token."""
    tokens = np.array(RENDERER.chunk(command, text), np.int32)
    logp = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 7
    return tree.answer(turn, Sampled(tokens, logp, logp, np.full(len(tokens), version, np.int32), Finish.STOP))


def make(capacity=512):
    return MessageTree("r", RENDERER, capacity)


def segments(tree, reward=1.0):
    return tree.segments("g", TASK, 3, reward, Status.COMPLETED)


def whole(trajectory):
    return np.concatenate([tokens for _, tokens in trajectory.segments()])


def test_a_plain_conversation_is_one_segment_whose_tokens_are_what_the_model_saw():
    tree, history = make(), [Message("system", "prompt"), user("ls")]
    fed, answer = [], []
    for number, command in enumerate(["ls", "cat notes.txt", None]):
        turn = tree.ask(history)
        assert turn.known == (0 if number == 0 else len(fed[-1]) + len(answer))
        fed.append(turn.tokens)
        message = say(tree, turn, command, "" if command else "done", version=number)
        answer = RENDERER.chunk(command, "" if command else "done")
        history = [*history, message, tool(f"notes {number}")]
    (t,) = segments(tree)
    assert (t.id, t.group_id, t.seed, t.final_reward, t.prefix_chunks, t.start_version) == ("r", "g", 3, 1.0, 0, 0)
    assert [chunk.versions[0] for chunk in t.chunks] == [0, 1, 2]
    assert whole(t).tolist() == [*fed[-1], *answer]
    assert whole(t).tolist() == RENDERER.render(history[:-1])  # as if it had been rendered in one piece
    assert [o.text for o in (t.prompt, *t.observations)] == ["ls", "notes 0", "notes 1"]


def test_the_same_request_again_is_a_second_sample_of_the_same_place():
    tree = make()
    first, second = tree.ask([user("ls")]), tree.ask([user("ls")])
    assert first.tokens.tolist() == second.tokens.tolist()
    say(tree, first, "ls")
    third = tree.ask([user("ls")])
    assert third.known == len(third.tokens)  # all of it was prefilled before
    say(tree, second, None, "no")
    say(tree, third, None, "yes")
    assert [(t.id, len(t.chunks), t.prefix_chunks) for t in segments(tree)] == [
        ("r", 1, 0),
        ("r~1", 1, 0),
        ("r~2", 1, 0),
    ]


def test_a_fork_trains_its_shared_past_once():
    tree = make()
    history = [user("ls")]
    history += [say(tree, tree.ask(history), "ls"), tool("notes.txt")]
    history += [say(tree, tree.ask(history), "cat notes.txt"), tool("yes")]
    say(tree, tree.ask(history), None, "done")
    other = [*history[:-1], tool("no")]
    say(tree, tree.ask(other), None, "no")
    first, second = segments(tree)
    assert (first.prefix_chunks, second.prefix_chunks) == (0, 2)
    assert [c.id for c in first.chunks] == ["r#0", "r#1", "r#2"]
    assert [c.id for c in second.chunks] == ["r#0", "r#1", "r#3"]


def test_sub_agents_and_compaction_start_segments_that_share_the_reward():
    tree, history = make(), [user("ls")]
    history += [say(tree, tree.ask(history), "ls"), tool("notes.txt")]
    sub = [Message("system", "summary of the work"), user("notes")]
    say(tree, tree.ask(sub), None, "yes")
    say(tree, tree.ask(history), "cat notes.txt")
    compacted = [user("summary"), user("of the work")]
    turn = tree.ask(compacted)
    assert turn.known == 0
    say(tree, turn, None, "done")
    found = segments(tree, reward=0.5)
    assert [(t.id, [c.id for c in t.chunks]) for t in found] == [
        ("r", ["r#1"]),
        ("r~1", ["r#0", "r#2"]),
        ("r~2", ["r#3"]),
    ]
    assert {t.final_reward for t in found} == {0.5}
    assert {t.group_id for t in found} == {"g"}


def test_an_edited_answer_is_context_not_something_sampled():
    """The agent strips or rewrites what the model said: those tokens are not the model's."""
    tree, history = make(), [user("ls")]
    said = say(tree, tree.ask(history), None, "yes ")
    edited = Message("assistant", said.content.strip())
    assert edited != said
    turn = tree.ask([*history, edited, user("no")])
    assert turn.known == 0
    say(tree, turn, None, "done")
    first, second = segments(tree)
    assert [len(t.chunks) for t in (first, second)] == [1, 1]
    assert whole(second).tolist() == RENDERER.render([*history, edited, user("no"), Message("assistant", "done")])


def test_a_malformed_answer_is_marked_and_the_history_goes_on_after_it():
    tree, history = make(), [user("ls")]
    turn = tree.ask(history)
    tokens = np.array(RENDERER.tokenizer.encode("no end"), np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    message = tree.answer(turn, Sampled(tokens, zeros, zeros, np.zeros(len(tokens), np.int32), Finish.LENGTH))
    say(tree, tree.ask([*history, message, user("no")]), None, "done")
    (t,) = segments(tree)
    assert [chunk.error for chunk in t.chunks] == [True, False]


def test_requests_that_cannot_be_served_are_named():
    tree = make(capacity=30)
    with pytest.raises(LedgerError, match="rollout r: messages: expected at least one"):
        tree.ask([])
    with pytest.raises(LedgerError, match="fewer than 30 tokens"):
        tree.ask([user("ls " * 40)])
    said = say(tree, tree.ask([user("ls")]), None, "yes")
    with pytest.raises(LedgerError, match="a message after the assistant's last"):
        tree.ask([user("ls"), said])
    assert len(segments(tree)) == 1  # what was refused left nothing behind


def test_an_unanswered_request_leaves_no_segment():
    tree = make()
    tree.ask([user("ls")])
    assert segments(tree) == []


def test_sub_agents_may_ask_at_the_same_time():
    tree, barrier = make(4096), threading.Barrier(8)

    def agent(number):
        history = [user(f"notes {number}")]
        barrier.wait(30)
        for step in range(10):
            history += [say(tree, tree.ask(history), f"cat {number}"), tool(f"{step}")]

    threads = [threading.Thread(target=agent, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = segments(tree)
    assert [len(t.chunks) for t in found] == [10] * 8
    assert len({c.id for t in found for c in t.chunks}) == 80


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["yes", "no"]), st.booleans()), min_size=1, max_size=14))
def test_every_response_is_trained_once_and_every_segment_is_what_the_model_saw(moves):
    """Whatever an agent does: it goes on from any history it has had, or starts anew, and repeats itself."""
    tree, histories, fed = make(4096), [[]], {}
    for choice, word, is_final in moves:
        history = [*histories[choice % len(histories)], tool(word) if choice % 2 else user(word)]
        turn = tree.ask(history)
        answer = say(tree, turn, None if is_final else "ls", word if is_final else "")
        fed[f"r#{len(fed)}"] = turn.tokens
        histories.append([*history, answer])
    found = segments(tree)
    trained = [chunk.id for t in found for chunk in t.chunks[t.prefix_chunks :]]
    assert sorted(trained) == sorted(fed)
    for t in found:
        tokens, at = whole(t), len(t.prompt.tokens)
        for index, chunk in enumerate(t.chunks):
            assert tokens[:at].tolist() == fed[chunk.id].tolist()
            at += len(chunk.tokens) + (len(t.observations[index].tokens) if index < len(t.observations) else 0)
