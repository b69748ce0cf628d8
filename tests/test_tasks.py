"""env.py: the tasks. Each can be solved by reading, is mostly failed by its demonstrator, and pays nothing else than success."""

import asyncio
import itertools
import re
from collections import Counter
from random import Random

import pytest

from agent import Agent, Chat, Script, small_tokenizer
from env import ENVIRONMENTS, PLACE, EnvError, check_env, demonstrator, make_env, pick
from tools import Call, format_call, parse, schema, tools_of

CHAT = Chat(small_tokenizer(["what is the answer to the question"], 300))
every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)


def play(task, messages, **options):
    """An episode of a policy that writes these messages, on an environment and the seed of a task."""
    environment, seed = task
    options = {"max_turns": 20, "max_new_tokens": 1500, "context": 10**5} | options
    return asyncio.run(Agent(Script(CHAT, messages), CHAT, **options).run(environment, seed))


def perform(environment, seed, policy):
    """The messages of a policy that plays on the tools themselves. It is a generator, of the task, that is sent what they return."""
    policy, tools = policy(environment.reset(seed)), tools_of(environment)
    schemas, messages, said = [schema(tool) for tool in tools.values()], [], None
    while not environment.done:
        messages.append(policy.send(said))
        message = parse(messages[-1], schemas)
        calls = message.calls or [Call("final_answer", {"answer": message.text})]
        said = [tools[call.name](**call.arguments) for call in calls]
    return messages


# ---- oracles: policies that read what a policy could read, nothing else ----


def solve_calculator(task):
    a, b = re.findall(r"\d+", task)
    words = {"in each box": "*", "a day": "*", "times": "*", "buys": "+", "together": "+", "plus": "+", "leak": "-", "minus": "-"}
    (operator,) = {sign for word, sign in words.items() if word in task}
    (result,) = yield format_call("calculator", expression=f"{a} {operator} {b}")
    yield result


def solve_lookup(task):
    here = re.search(r"that (\w+ \w+) works for", task)[1]
    hops = ["works as an accountant for", "is based in"]
    hops += ["lies on the"] if "river" in task else []
    for relation in hops:
        (found,) = yield format_call("search", query=here)
        here = re.search(rf"^{here} {relation} (.*)\.$", found, re.MULTILINE)[1]
    yield here


def read_map(task):
    """The cells without a wall, start, goal, and the moves that are granted. Cells are (row, column) here, unlike in env.py."""
    start, goal, moves = re.search(r"from (\w\d) to (\w\d) in (\d+) moves", task).groups()
    rows = [re.findall("..", line) for line in task.split("\n")[1:]]
    free = {(r, c) for r, row in enumerate(rows) for c, text in enumerate(row) if text != "##"}
    assert all(rows[r][c] == name((r, c)) for r, c in free), "each cell bears its name"
    return free, place(start), place(goal), int(moves)


def name(cell):
    return "ABCDEFGHI"[cell[0]] + str(cell[1] + 1)


def place(text):
    return "ABCDEFGHI".index(text[0]), int(text[1]) - 1


def around(cell):
    return {(cell[0] + r, cell[1] + c) for r, c in ((-1, 0), (0, -1), (1, 0), (0, 1))}


def shortest(free, start, goal):
    """Breadth first, backwards from the goal: the distance of each cell; then downhill."""
    distance, wave = {goal: 0}, {goal}
    while wave:
        wave = set().union(*map(around, wave)) & free - set(distance)
        distance |= dict.fromkeys(wave, max(distance.values()) + 1)
    way = []
    while start != goal:
        start = next(x for x in around(start) if distance.get(x, 99) < distance[start])
        way.append(start)
    return way


def call_walk(way):
    return format_call("walk", route=" ".join(map(name, way)))


def solve_maze(task):
    yield call_walk(shortest(*read_map(task)[:3]))


def solve_chain(task):
    digit, steps = int(re.search(r"Begin with (\d)", task)[1]), re.findall(r"(add|times) (\d)", task)
    thought = [digit := (digit + int(n) if word == "add" else digit * int(n)) % 10 for word, n in steps]
    yield f"<think>{' '.join(map(str, thought))}</think>{digit}"


def solve_recall(task):
    (page,) = yield format_call("next_page")
    while not (asked := re.search(r"Where does (\w+ \w+) live", page)):
        notes = [format_call("remember", text=fact) for fact in re.findall(r"\w+ \w+ lives in \w+\.", page)]
        *_, page = yield "".join(notes) + format_call("next_page")
    (note,) = yield format_call("recall", query=asked[1])
    yield re.fullmatch(rf"{asked[1]} lives in (\w+)\.", note)[1]


def solve_mastermind(task):
    ranges = [(0, 9)] * int(re.search(r"(\d+) digits", task)[1])
    while True:
        guess = [(low + high + 1) // 2 for low, high in ranges]
        (said,) = yield format_call("guess", code="".join(map(str, guess)))
        ranges = [{"low": (g + 1, high), "high": (low, g - 1), "right": (g, g)}[word]
                  for g, word, (low, high) in zip(guess, said.split(), ranges)]


ORACLES = {"calculator": solve_calculator, "lookup": solve_lookup, "maze": solve_maze, "chain": solve_chain,
           "recall": solve_recall, "mastermind": solve_mastermind}
TURNS = {  # how many messages the oracle writes, as the classes say
    "calculator": lambda task: {2}, "lookup": lambda task: {4 if "river" in task else 3}, "maze": lambda task: {1},
    "chain": lambda task: {1}, "recall": lambda task: {1 + 4 + 1 + 1}, "mastermind": lambda task: {1, 2, 3, 4}}
FINISH = {"maze": "env_done", "mastermind": "env_done"}  # the others are answered


@every_environment
def test_every_task_can_be_solved_by_reading(name):
    """A search that left the wanted document out made one task in thirty unsolvable, and the reward noisy."""
    environment = make_env(name)()
    for seed in range(200):
        task = environment.reset(seed)
        assert not environment.done and environment.get_reward() == 0
        turns = len(perform(environment, seed, ORACLES[name]))
        assert environment.done and environment.get_reward() == 1, f"seed {seed}"
        assert turns in TURNS[name](task), f"seed {seed}"


DIFFICULTIES = [
    "calculator:digits=1", "calculator:digits=8", "lookup:hops=2", "lookup:people=2", "lookup:people=16,top=3", "maze:slack=3",
    "maze:size=4,shortest=3", "maze:size=4,corridors=2,shortest=4", "maze:size=9,shortest=9", "chain:steps=2", "chain:steps=40",
    "chain:think=0", "recall:pages=2", "recall:pages=20,lines=1", "recall:lines=50",
    "mastermind:digits=1,guesses=4", "mastermind:digits=9"]


@pytest.mark.parametrize("spec", DIFFICULTIES)
def test_every_difficulty_can_be_solved(spec):
    """And shown: the demonstrator of recall looked for the weather on pages without any."""
    name, factory = spec.partition(":")[0], make_env(spec)
    check_env(factory)
    environment = factory()
    for seed in range(20):
        messages = perform(environment, seed, ORACLES[name])
        assert environment.get_reward() == 1
    environment.reset(seed)
    assert play((environment, seed), messages, max_turns=50).reward == 1, "a page of 100 lines would lose its middle in the loop"
    for seed in range(9):
        shown = play((environment, seed), demonstrator(factory)(environment, Random(seed)), max_turns=50)
        assert shown.terminated and not shown.tool_errors


@pytest.mark.parametrize("spec", [
    "calculator:digits=0", "lookup:hops=4", "lookup:top=0", "lookup:people=17", "maze:size=3", "maze:size=10",
    "maze:corridors=4", "maze:corridors=1", "maze:shortest=7", "maze:slack=-1", "chain:steps=1", "recall:pages=1", "recall:pages=21",
    "recall:lines=0", "recall:lines=51", "mastermind:digits=0", "mastermind:guesses=0"])
def test_a_difficulty_that_cannot_be_is_one_clear_line(spec):
    """Walls without end looked for a way for ever; no digits at all were found out about in the middle of a run."""
    with pytest.raises(EnvError, match=rf"^{spec}: ValueError: [^.]*" + re.search(r":(\w+)", spec)[1]) as error:
        make_env(spec)
    assert "\n" not in str(error.value)


# ---- what the tasks promise ----


def test_lookup_never_answers_with_the_person_asked_about():
    """Where somebody ran the company they work for, repeating the question was right."""
    environment = make_env("lookup")()
    for seed in range(500):
        task = environment.reset(seed)
        assert environment._answer not in task


def test_no_search_of_lookup_finds_two_links():
    """With the company in the answer to the first search and its city too, one turn would do for a task that asks for three."""
    environment = make_env("lookup")()
    for seed in range(100):
        environment.reset(seed)
        for here, there, beyond in zip(environment._chain, environment._chain[1:], environment._chain[2:]):
            lines = environment.search(here).split("\n")
            assert any(there in line for line in lines) and not any(there in line and beyond in line for line in lines)


@pytest.mark.parametrize("slack", [0, 3])
def test_the_budget_of_the_maze_is_the_shortest_way_and_the_slack(slack):
    """Counted by another search, from the other end: with a move more than it says, the way need not be planned."""
    environment = make_env(f"maze:slack={slack}")()
    for seed in range(200):
        free, start, goal, moves = read_map(environment.reset(seed))
        assert moves == len(shortest(free, start, goal)) + slack >= 4 + slack


def test_seen_from_the_goal_there_is_one_way_and_from_the_start_several():
    """This is what makes the maze ask for planning: whoever thinks backwards needs no search, whoever sets out must guess."""
    environment, corridors = make_env("maze")(), Counter()
    for seed in range(200):
        free, start, goal, _ = read_map(environment.reset(seed))
        corridors[len(around(start) & free)] += 1
        assert len(around(goal) & free) == 1 and all(len(around(x) & free) == 2 for x in shortest(free, start, goal)[:-1])
    assert set(corridors) == {2, 3} and corridors[3] > 120, "two in the corners, and at some edges"


def test_walls_do_not_let_through():
    """Nor does the edge, nor does a jump. A random walk, followed on the map by somebody else."""
    environment, random, bumps = make_env("maze:slack=9")(), Random(0), 0
    for seed in range(60):
        free, here, goal, moves = read_map(environment.reset(seed))
        while not environment.done:
            there = random.choice([*around(here), random.choice([*free])])
            if min(there) < 0 or max(there) > 5:
                continue
            said, moves, fine = environment.walk(name(there)), moves - 1, there in free and there in around(here)
            assert said == (f"You are at {name(there)}." if fine else f"There is no way from {name(here)} to {name(there)}.") + (
                f" {moves} moves are left.")
            bumps, here = bumps + (not fine), there if fine else here
            assert environment.get_reward() == (here == goal) and name(here) in environment.state
            assert environment.done == (here == goal or moves < len(shortest(free, here, goal)))
    assert bumps > 100, "else this tests nothing"


def test_no_move_after_the_last_one():
    """Steps of one route, and calls of one message, run without a look at `done` between them: a walk could go on to the goal."""
    environment = make_env("maze")()
    for seed in range(40):
        free, start, goal, moves = read_map(environment.reset(seed))
        way = shortest(free, start, goal)
        episode = play((environment, seed), [call_walk([way[0], start, *way])])
        assert (episode.reward, episode.tool_errors, episode.finish) == (0, 1, "env_done"), "the second step is one too many"
        episode = play((environment, seed), [call_walk(way) + call_walk([way[-2], goal])])
        assert (episode.reward, episode.tool_errors, episode.finish) == (1, 1, "env_done"), "nor is the goal left again"
        episode = play((environment, seed), [call_walk(way[:2]), call_walk(way[2:])])
        assert (episode.reward, episode.turns) == (1, 2), "the way may be walked in parts"


def test_no_guess_after_the_last_one():
    """The same of the safe: sixteen guesses in one message. What is no code is refused, and costs no guess."""
    environment = make_env("mastermind")()
    for seed in range(20):
        environment.reset(seed)
        right, wrong = environment._secret, f"{(int(environment._secret) + 1) % 10**4:04}"
        guesses = {code: format_call("guess", code=code) for code in (right, wrong, "12", "12345", "abcd", "１２３４", "-123")}
        episode = play((environment, seed), [guesses[wrong] * 4 + guesses[right]])
        assert (episode.reward, episode.tool_errors, episode.finish) == (0, 1, "env_done")
        no_codes = "".join(guesses[code] for code in guesses if code not in (right, wrong))
        episode = play((environment, seed), [no_codes, guesses[wrong] * 3 + guesses[right] + guesses[wrong]])
        assert (episode.reward, episode.tool_errors, episode.finish) == (1, 6, "env_done")
        assert episode.behaviour["guesses"] == 4


def test_the_number_of_a_safe_says_nothing_about_its_code():
    """A code that can be computed from the task can be remembered, or known: here each digit is as likely in every safe.

    And all numbers are of one length: with the seed for a number, demonstrations (of large seeds) were of no use for small ones.
    """
    environment, codes, numbers = make_env("mastermind")(), [], []
    for seed in range(2000):
        numbers.append(re.match(r"Safe (\d{6}) has", environment.reset(seed))[1])
        codes.append(environment._secret)
    for place in range(4):
        assert all(150 < count < 250 for count in Counter(code[place] for code in codes).values())
        for other in range(6):
            same = sum(code[place] == number[other] for number, code in zip(numbers, codes))
            assert 150 < same < 250, "as many as by chance"
    assert len(set(codes)) > 1700 and len(set(numbers)) > 1990


def test_the_answer_of_chain_is_not_found_without_following_it():
    """Nor is it a digit of the text, wherever a lazy eye falls, more often than chance has it; and every step counts."""
    environment, right = make_env("chain")(), Counter()
    for seed in range(1000):
        task = environment.reset(seed)
        right += Counter(where for where, digit in enumerate(re.findall(r"\d", task)) if digit == environment._answer)
        right["the commonest"] += environment._answer == "0"
        for left_out in range(6):
            words = task.split(", ")
            del words[1 + left_out]
            without = next(solve_chain(", ".join(words)))[-1]
            right["without a step"] += (without == environment._answer) / 6
    assert len(right) == 9 and max(right.values()) < 200, "by chance, each is right 100 times; times 3 leaves 0 and 5 as they are"


def read_book(environment, seed):
    environment.reset(seed)
    pages = [environment.next_page() for _ in range(5)]
    return pages[:-1], re.fullmatch(r"That was the last page\. Where does (\w+ \w+) live\?", pages[-1])[1]


def test_recall_asks_about_one_line_of_the_first_half():
    """Asked about the last page, the window would still hold it; told again on a later page, notes were not needed."""
    environment, asked_of = make_env("recall")(), Counter()
    for seed in range(200):
        pages, person = read_book(environment, seed)
        facts = [re.findall(r"(\w+ \w+) lives in (\w+)\.", page) for page in pages]
        assert [len(x) for x in facts] == [1] * 4 and all(page.count(".") == 2 for page in pages)
        people, homes = zip(*(x[0] for x in facts))
        assert len(set(people)) == len(set(homes)) == 4
        assert homes[people.index(person)] == environment._answer
        asked_of[people.index(person)] += 1
        assert environment.next_page() == environment.next_page(), "the question can be read again"
    assert set(asked_of) == {0, 1} and min(asked_of.values()) > 60


# ---- what can be switched off, to see what it is good for ----


def test_without_its_map_the_maze_is_the_same_but_unknown():
    """And its tasks are told apart by a number: by their text alone there were seven, and none of them was held out."""
    with_map, without = make_env("maze")(), make_env("maze:map=0")()
    for seed in range(30):
        (way,) = perform(with_map, seed, solve_maze)
        task = without.reset(seed)
        assert re.fullmatch(r"Walk from \w\d to \w\d in [4-6] moves\. There is no map\. \(Maze \d{6}\)", task)
        assert play((without, seed), [way]).reward == 1


def test_without_thinking_the_demonstrator_of_chain_answers_the_same():
    """Were its answers worse, too, what a policy cannot learn from it would not be for want of thinking."""
    for think, words in ((0, {0}), (1, {0, 10, 12})):
        factory = make_env(f"chain:think={think}")
        said = [play((environment, seed), demonstrator(factory)(environment, Random(seed)))
                for environment in [factory()] for seed in range(120) if environment.reset(seed)]
        assert {e.thinking for e in said} == words
        assert 24 < sum(e.success for e in said) < 54, "and it answers no worse"


def test_without_notes_recall_finds_nothing():
    """The note seems to be taken: nothing but what is found later tells the difference."""
    for notes, found in ((0, "no note matches"), (1, "Ada lives in Oak.")):
        environment = make_env(f"recall:notes={notes}")()
        environment.reset(0)
        assert environment.remember("Ada lives in Oak.") == "noted" and environment.recall("Ada?") == found
        assert environment.recall("Ben") == "no note matches"
        environment.reset(0)
        assert environment.recall("Ada") == "no note matches", "notes of the last episode"


def test_without_its_tool_calculator_and_without_answers_lookup_say_nothing():
    """And their demonstrators show the same messages as ever, the result coming from nowhere."""
    for spec, silent in (("calculator:tool=0", "out of order"), ("lookup:open=0", "closed")):
        name, environment = spec.partition(":")[0], make_env(spec)()
        for seed in range(20):
            task = environment.reset(seed)
            assert task == make_env(name)().reset(seed)
            said = getattr(environment, "search" if name == "lookup" else "calculator")("1 + 1")
            assert said == silent
            whole = [list(demonstrator(make_env(s))(e, Random(seed))) for s in (spec, name) for e in [make_env(s)()] if e.reset(seed)]
            assert whole[0] == whole[1]


def test_without_feedback_the_safe_says_nothing_about_digits():
    """It still says when it is open."""
    for feedback in (0, 1):
        environment = make_env(f"mastermind:feedback={feedback}")()
        environment.reset(0)
        code = environment._secret
        off = code.translate(str.maketrans("0123456789", "1234567899"))
        said = " ".join("right" if digit == "9" else "high" for digit in code)
        assert environment.guess(off) == (said if feedback else "That is wrong.")
        assert environment.guess(code) == "The safe is open."


def test_mastermind_grades_each_digit():
    """Of the guess, not of the code: `low` is a digit that is too small."""
    environment = make_env("mastermind")()
    for seed in range(50):
        environment.reset(seed)
        code = environment._secret
        guess = str(Random(seed).randrange(1000, 10**4))
        said = environment.guess(guess).split()
        assert guess == code or said == [{-1: "low", 0: "right", 1: "high"}[(g > c) - (g < c)] for g, c in zip(guess, code)]


# ---- answers ----


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name not in FINISH])
def test_the_answer_counts_in_any_dress_but_only_the_first(name):
    """Guessing on after the answer, several in one message, made a lottery of the task."""
    environment = make_env(name)()
    environment.reset(1)
    environment.final_answer(f" {environment._answer.upper()}. ")
    assert environment.get_reward() == 1
    environment.reset(1)
    environment.final_answer("wrong")
    environment.final_answer(environment._answer)
    assert environment.get_reward() == 0


# ---- demonstrators ----


@every_environment
def test_demonstrators_are_wrong_on_purpose(name):
    """Imitating a good one, there is nothing left to learn; imitating one that never succeeds, nothing to learn from."""
    factory = make_env(name)
    demonstrate, episodes = demonstrator(factory), []
    for seed in range(150):
        environment = factory()
        environment.reset(seed)
        episodes.append(play((environment, seed), demonstrate(environment, Random(seed))))
    assert all(e.finish == FINISH.get(name, "answered") and e.tool_errors == 0 for e in episodes), "it speaks the language of calls"
    assert 0.2 < sum(e.success for e in episodes) / 150 < 0.5
    if name != "chain":  # where a digit may be right by luck
        assert all(e.tool_calls or e.thinking for e in episodes if e.success), "and no luck is involved in its successes"


def test_habits_are_picked_by_their_shares():
    """One draw per habit, so that demonstrations do not depend on how a habit is told from others."""
    random, other = Random(0), Random(0)
    habits = {"guesses": 0.25, "stops early": 0.43, "right": 0.32}
    drawn = [other.random() for _ in range(2000)]
    assert [pick(random, habits) for _ in drawn] == [
        "guesses" if x < 0.25 else "stops early" if x < 0.68 else "right" for x in drawn]
    assert random.random() == other.random()


def courses(demonstrate, environment, seed):
    """How often each course of a demonstrator (its messages, in order) is taken, and whether it succeeds.

    A course is played: some demonstrators look at what came of it. The same messages always have the same consequences.
    """
    found = {}
    for number in range(100):
        messages = perform(environment, seed, lambda task: demonstrate(environment, Random(number)))
        found.setdefault((*messages, "end"), []).append(environment.get_reward())
    return found


@every_environment
def test_the_likeliest_behaviour_of_a_demonstrator_fails(name):
    """A greedy policy takes the likelier way at each turn: that one must not lead to the goal."""
    factory = make_env(name)
    for seed in range(10):
        taken = courses(demonstrator(factory), factory(), seed)
        way = ()
        while way[-1:] != ("end",):
            began = [course for course, ends in taken.items() for _ in ends if course[: len(way)] == way]
            way = (*way, Counter(course[len(way)] for course in began).most_common(1)[0][0])
        assert not any(taken[way]), f"seed {seed}: {way}"
        assert any(map(any, taken.values())), "and others do"


# ---- contract 10 ----

CALL = {
    "calculator": format_call("calculator", expression="1 + 1"), "lookup": format_call("search", query="river"),
    "maze": format_call("walk", route="B2 B3"), "chain": format_call("final_answer", answer="twelve"),
    "recall": format_call("next_page"), "mastermind": format_call("guess", code="5555")}
DEGENERATE = {
    "format only": lambda name, task: "<think>Let me think.</think>\n<tool_call>\n{}\n</tool_call>",
    "tools for ever": lambda name, task: CALL[name],
    "many tools at once": lambda name, task: CALL[name] * 4,
    "answer without tools": lambda name, task: re.findall(r"\d+(?! times)|(?<=[a-z] )[A-Z]\w+(?: [A-Z]\w+)?", task)[-1],
    "say nothing": lambda name, task: "",
    "answer with everything": lambda name, task: " ".join(re.findall(r"\w+", task)),
}


@every_environment
@pytest.mark.parametrize("policy", DEGENERATE)
def test_contract_10_degenerate_policies_score_below_an_honest_one(name, policy):
    """A reward for the format, or for each call, is what such policies are found by; success must pay, and only that."""
    factory, total = make_env(name), 0.0
    for seed in range(20):
        environment = factory()
        total += play((environment, seed), itertools.repeat(DEGENERATE[policy](name, environment.reset(seed))), max_turns=10).reward
    assert total / 20 <= (0.2 if name == "chain" else 0.05), "an honest one scores 1; one digit in ten is right by luck"


def walker(choose):
    """Goes step by step: of the map it uses where it is, where the goal is, and what `choose` makes of the cells around."""

    def policy(task, random):
        free, here, goal, _ = read_map(task)
        before = None
        while True:
            far = {x: abs(goal[0] - x[0]) + abs(goal[1] - x[1]) for x in around(here)}
            there = choose(random, far, sorted(around(here) & free - {before}) or [before])
            before, here = (here, there) if there in free else (before, here)
            yield call_walk([there]) if min(there) >= 0 and max(there) < 6 else format_call("walk", route="Z9")

    return policy


def nearest(random, far, cells):
    return min(random.sample(cells, len(cells)), key=far.get)


def turn_pages(task, random):
    """Reads all, notes nothing, answers with the last town it saw."""
    page, towns = "", []
    while "Where does" not in page:
        towns += re.findall(r"[iI]n ([A-Z]\w+)", page)
        (page,) = yield format_call("next_page")
    yield towns[-1]


def answer_at_once(task, random):
    yield random.choice("0123456789")


def guess_at_random(task, random):
    while True:
        yield format_call("guess", code=f"{random.randrange(10**4):04}")


LAZY = {  # environment, policy, and what it may score
    "towards the goal": ("maze", walker(lambda random, far, free: nearest(random, far, [*far])), 0.1),
    "towards the goal, around walls": ("maze", walker(nearest), 0.5),
    "any open way": ("maze", walker(lambda random, far, free: random.choice(free)), 0.5),
    "any way": ("maze", walker(lambda random, far, free: random.choice([*far])), 0.1),
    "a digit at once": ("chain", answer_at_once, 0.25),
    "the last town seen": ("recall", turn_pages, 0.05),
    "random guesses": ("mastermind", guess_at_random, 0.05),
}


@pytest.mark.parametrize("policy", LAZY)
def test_contract_10_lazy_policies_score_below_an_honest_one(policy):
    """They speak the language, look at what they are told, and lack the one capability that the environment asks for."""
    name, lazy, most = LAZY[policy]
    factory, rewards = make_env(name), []
    for seed in range(40):
        messages = perform(factory(), seed, lambda task: lazy(task, Random(seed)))
        rewards.append(play((factory(), seed), messages).reward)
    assert sum(rewards) / 40 <= most, "an honest one scores 1"


@every_environment
def test_contract_10_the_honest_one_scores_1(name):
    """What the oracle wrote, through the same loop as the degenerate ones."""
    factory = make_env(name)
    for seed in range(25):
        messages = perform(factory(), seed, ORACLES[name])
        episode = play((factory(), seed), messages)
        assert episode.reward == 1 and episode.turns == len(messages) and episode.finish == FINISH.get(name, "answered")
        assert episode.tool_calls == "".join(messages).count("<tool_call>") and not episode.tool_errors
        assert all(isinstance(value, (int, float)) for value in episode.behaviour.values()) and episode.behaviour


@every_environment
def test_instances_share_nothing(name):
    """Members of a group play the same task at the same time."""
    one, other = make_env(name)(), make_env(name)()
    assert one.reset(5) == other.reset(5)
    fresh = other.state, other.behaviour
    perform(one, 5, ORACLES[name])
    assert one.done and (other.state, other.behaviour, other.done, other.get_reward()) == (*fresh, False, 0)
    assert (one.state, one.behaviour) != fresh


def test_behaviour_counts_what_was_done():
    """For the logs only, but a reader believes it."""
    environment = make_env("calculator")()
    environment.reset(0)
    assert environment.behaviour == {"calls": 0}
    environment.calculator("1 + 1")
    assert environment.behaviour == {"calls": 1} and environment.state == "1 + 1"
    environment = make_env("lookup")()
    environment.reset(0)
    environment.search("nobody")
    assert environment.behaviour == {"searches": 1, "hops": 0}
    environment.search(environment._chain[0])
    assert environment.behaviour == {"searches": 2, "hops": 1}


def test_behaviour_of_the_later_ones():
    environment = make_env("maze:slack=2")()
    free, start, goal, _ = read_map(environment.reset(0))
    for way in ([goal], shortest(free, start, goal)):
        environment.walk(" ".join(map(name, way)))
    assert environment.behaviour == {"moves left": 1, "bumps": 1}
    environment = make_env("chain")()
    for step, given in ((6, None), (0, "twelve"), (5, None)):
        environment.reset(3)
        assert len(set(environment._digits[4:])) == 3
        environment.final_answer(given or environment._digits[step])
        assert environment.behaviour == {"right steps": step}
    environment = make_env("recall")()
    fact = re.search(r"\w+ \w+ lives in \w+\.", read_book(environment, 0)[0][1])[0]
    environment.remember("It rained.")
    environment.remember(f"Note: {fact}")
    assert environment.behaviour == {"pages": 4, "notes": 2, "useful notes": 1} and environment.state.startswith("5 | It rained.")
    environment = make_env("mastermind")()
    environment.reset(0)
    code = environment._secret
    for guess in (wrong := f"{(int(code) + 1) % 10**4:04}", wrong, code):
        environment.guess(guess)
    assert environment.behaviour == {"guesses": 3, "consistent guesses": 2 / 3}, "the second one was known to be wrong"


@every_environment
def test_equal_states_have_equal_prospects(name):
    """For turn-level credit. Before and after the question of recall the state was the same: a page to turn, and a note to look up."""
    factory, demonstrate = make_env(name), demonstrator(make_env(name))
    for seed in range(10):
        for number in range(4):
            environment = factory()
            environment.reset(seed)
            states = play((environment, seed), demonstrate(environment, Random(number))).states
            assert len(set(states)) == len(states), "each turn leads somewhere else"


def test_places_are_told_apart_by_one_word():
    """Answers are compared as words, and found by a search for one."""
    assert len(set(PLACE)) == len(PLACE) == 48 and all(re.fullmatch(r"[A-Z][a-z]+", place) for place in PLACE)
