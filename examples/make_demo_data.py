"""Write the demo's data: order messages in free wording, each with the one-line record that it asks for.

    python examples/make_demo_data.py            # writes examples/demo/train.jsonl and valid.jsonl
    python examples/make_demo_data.py OUT_DIR

    prompt      Hi, Marta here. We need twelve tin lanterns sent to Harrowgate. The roof still leaks.
    completion  item: tin lanterns | count: 12 | to: Harrowgate | by: Marta

The answer is checkable (all of it right, or wrong), a small model cannot give it untrained, and it can learn
it in minutes: three values are copied out of the message and the count is turned into digits. Facts come in
any order, between polite and idle sentences, some of which hold another number. The held-out rows share with
the training rows no name, no place, no item and no wording: every list below exists twice, and
`tests/test_demo_data.py` holds them apart. Standard library only; one seed, so the files come out the same
everywhere.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 8137
TRAIN_ROWS, VALID_ROWS = 400, 120
WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
}


@dataclass(frozen=True)
class Pool:
    """What one split is made of. In the sentences, {n} {item} {to} {by} are the four facts."""

    names: tuple[str, ...]
    places: tuple[str, ...]
    items: tuple[str, ...]
    open_by: tuple[str, ...]  # first sentences that say who asks
    close_by: tuple[str, ...]  # last ones that do
    ask: tuple[str, ...]  # what and how many
    send: tuple[str, ...]  # where to
    ask_send: tuple[str, ...]  # both in one sentence
    whole: tuple[str, ...]  # all four facts at once
    hello: tuple[str, ...]
    idle: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        said_by = (*self.open_by, *self.close_by, *self.hello, *self.idle)
        return (*said_by, *self.ask, *self.send, *self.ask_send, *self.whole)


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


TRAIN = Pool(
    names=_split("""
        Marta, Oskar, Priya, Dmitri, Yusuf, Helena, Tobias, Amara, Lorenzo, Ingrid, Kenji, Fatima, Gareth,
        Bianca, Rashid, Solveig, Emeka, Paloma, Viktor, Noor, Cedric, Zanele, Matteo, Astrid, Hamish, Leila,
        Stefan, Chidi, Rosalind, Tariq, Brigitte, Anders, Mirela, Joaquin, Petra, Sanjay, Elspeth, Ruben,
        Akiko, Declan, Farah, Nils, Ottilie, Cyrus, Jasmin, Pavel, Winona, Idris, Greta, Mateus"""),
    places=_split("""
        Harrowgate, Lindmouth, Castlebay, Oakhaven, Rivermill, Stonebridge, Ashford, Kelmore, Westbrook,
        Dunlow, Fernleigh, Port Alma, Saltmarsh, Birchwood, Greenhollow, Marsdale, Tilbury, Whitecliff,
        Eastwick, Foxton, Glenrath, Hartsea, Inverlay, Juniper Hill, Kingsford, Larkspur, Millpond, Northam,
        Ostrava, Pinecrest, Quarrydale, Redfield, Sandgate, Thornbury, Upper Vale, Verona, Wexcombe, Yarmouth,
        Zelden, Bergamo"""),
    items=_split("""
        tin lanterns, wool blankets, garden chairs, clay pots, steel buckets, paper lamps, oak shelves, copper
        pipes, rubber boots, canvas tents, soup bowls, desk fans, bread knives, silk scarves, door hinges,
        rope ladders, fishing nets, picture frames, cotton towels, tea kettles, wall clocks, ink cartridges,
        bicycle pumps, camping stoves, safety helmets, water filters, floor mats, window blinds, leather
        belts, glass jars, iron skillets, bamboo trays, jigsaw puzzles, spice racks, sewing kits, yoga
        cushions, piano stools, egg timers, paint rollers, straw hats, tomato seeds, brass bells, plastic
        crates, wooden spoons, ceramic tiles, dog leashes, hand mirrors, solar panels, fruit baskets, toy
        trains"""),
    open_by=(
        "{by} here.", "Hi, this is {by}.", "Good morning, {by} speaking.", "It is {by} again.",
        "My name is {by}.", "Hello, {by} from the front desk.", "This note comes from {by}.",
        "You are talking to {by}.", "{by} is writing to you.", "Hey, it's {by}.",
        "I'm {by}, we spoke before.", "{by} calling from the workshop.",
    ),
    close_by=(
        "Thanks, {by}", "Best regards, {by}", "Please put it under {by}.", "The order is from {by}.",
        "Cheers, {by}.", "Kind wishes from {by}.", "Book it for {by}, please.", "Signed, {by}",
        "Many thanks, {by}.", "Yours, {by}", "{by} is the one ordering.",
        "If anyone asks, {by} ordered this.", "Charge it to {by}.",
    ),
    ask=(
        "We need {n} {item}.", "Could I get {n} {item}?", "Please prepare {n} {item}.",
        "I would like {n} {item}.", "Can you set aside {n} {item} for us?",
        "Our team is short of {item}, {n} would do.", "It is {item} that we want, {n} of them.",
        "Put me down for {n} {item}.", "We are after {n} {item} this time.",
        "I want to order some {item}. Make it {n}.", "Add {n} {item} to the list.", "How about {n} {item}?",
        "The shop ran out of {item}, so pack {n}.", "Kindly reserve {n} {item}.",
    ),
    send=(
        "Send them to {to}.", "They go to {to}.", "The address is in {to}.",
        "Deliver everything to {to}, please.", "We are based in {to}.", "{to} is where they belong.",
        "Ship it all to {to}.", "The van should drive to {to}.", "Drop them off in {to}.",
        "For delivery we use our place in {to}.", "Our door is in {to}.", "Make sure they reach {to}.",
    ),
    ask_send=(
        "We need {n} {item} sent to {to}.", "Please ship {n} {item} to {to}.",
        "Could you bring {n} {item} to {to}?", "Our branch in {to} wants {n} {item}.",
        "{to} is waiting for {n} {item}.", "Send {to} {n} {item}.", "I am looking for {n} {item} in {to}.",
        "There should be {n} {item} on the truck to {to}.", "For the house in {to} I would take {n} {item}.",
        "In {to} they asked for {n} {item}.", "Get {n} {item} over to {to}.",
        "Would it be possible to have {n} {item} delivered to {to}?",
    ),
    whole=(
        "{by} would like {n} {item} in {to}.", "Please send {by} {n} {item}, the address is in {to}.",
        "{by} from {to} wants {n} {item}.", "An order came in from {by}: {n} {item}, to be shipped to {to}.",
        "To {to}, please: {n} {item}, ordered by {by}.", "{n} {item} for {by}, going to {to}.",
        "I spoke to {by}, who needs {n} {item} in {to}.",
        "On behalf of {by} I ask for {n} {item}. Bring them to {to}.",
        "{by} called about {item}. It should be {n}, and they go to {to}.",
        "In {to} there is {by}, who is hoping for {n} {item}.",
    ),
    hello=(
        "Hi there.", "Good afternoon.", "Hello team.", "Dear shop,", "Hey,", "Sorry to bother you.",
        "Quick one.", "Good evening.", "Me again.", "Hope all is well.",
    ),
    idle=(
        "The roof still leaks.", "It has rained all week.", "Last time one box was broken.",
        "No rush at all.", "The old ones lasted 9 years.", "You were very kind on the phone.",
        "My invoice number is 4471.", "We open at eight.", "Parking is behind the building.",
        "The driver may ring twice.", "Lunch is on us.", "We paid 30 for the last lot.",
        "Please call if something is unclear.", "The blue door is ours.",
        "We have been customers for six years.", "Everyone was happy with the previous delivery.",
        "There are 3 steps at the entrance.", "The dog is friendly.", "Take your time.",
        "Ring the bell twice.",
    ),
)

VALID = Pool(
    names=_split("""
        Wendell, Carmen, Hiroshi, Agnes, Malik, Florence, Duncan, Svetlana, Omar, Beatrix, Tomas, Nkechi,
        Ronan, Camille, Isaac, Philippa, Arjun, Delia, Magnus, Salome, Ewan, Lucinda, Goran, Thandi,
        Quentin"""),
    places=_split("""
        Brackley, Dovercourt, Elmstead, Highmoor, Copperton, Windermere, Saint Ives, Trento, Barrow Point,
        Clifden, Netherby, Langholm, Cedar Falls, Murano, Padstow, Rosewell, Hollybush, Torquay, Ambleside,
        Granada"""),
    items=_split("""
        velvet curtains, candle holders, carbon brushes, beach umbrellas, shower heads, pencil cases, apple
        peelers, marble coasters, night lights, chess boards, linen aprons, snow shovels, cable drums, pepper
        grinders, bath sponges, tennis rackets, cork boards, plum trees, file folders, coffee mugs, laundry
        bags, guitar strings, car batteries, bird feeders, travel pillows"""),
    open_by=(
        "You have {by} on the line.", "Greetings from {by}.", "{by} at your service.",
        "Morning! I am called {by}.", "Here is {by} once more.", "Allow me to introduce myself: {by}.",
    ),
    close_by=(
        "All the best, {by}", "Yours sincerely, {by}", "Note that {by} placed this order.", "Warmly, {by}.",
        "Write {by} on the slip.", "The customer is {by}.", "With gratitude, {by}",
    ),
    ask=(
        "May we have {n} {item}?", "Our stock of {item} is gone and {n} more would help.",
        "Let us have {n} {item}.", "I hope you can spare {n} {item}.", "What I require is {n} {item}.",
        "This is about {item}: we lack {n}.", "Wrap up {n} {item} for me.",
    ),
    send=(
        "Their destination is {to}.", "Everything travels to {to}.",
        "Please have it dropped at our {to} office.", "You will find us in {to}.",
        "Forward the lot to {to}.", "The recipient lives in {to}.",
    ),
    ask_send=(
        "Kindly dispatch {n} {item} towards {to}.", "People in {to} are asking for {n} {item}.",
        "Is there any chance of getting {n} {item} as far as {to}?",
        "We hope to see {n} {item} arrive in {to}.", "Let {n} {item} be carried to {to}.",
        "My warehouse in {to} has room for {n} {item}.",
    ),
    whole=(
        "{by} ordered {n} {item} and lives in {to}.", "Could {by} receive {n} {item} at the {to} store?",
        "A customer named {by} requests {n} {item}; destination {to}.",
        "Over in {to}, {by} is missing {n} {item}.", "See that {n} {item} reach {by} over in {to}.",
    ),
    hello=(
        "Good day.", "To whom it may concern,", "Excuse me.", "Happy new year!", "Pardon the short notice.",
    ),
    idle=(
        "Snow is expected tonight.", "Our lift is out of order.", "The gate code is 2580.",
        "I loved your catalogue.", "You can leave it with the neighbour.",
        "Someone will be home until noon.", "We moved here 5 months ago.", "Card payment is fine.",
        "A receipt would be nice.", "The kids are excited.",
    ),
)


def row(pool: Pool, rng: random.Random) -> dict[str, str]:
    """One message and its record."""
    facts = {"item": rng.choice(pool.items), "to": rng.choice(pool.places), "by": rng.choice(pool.names)}
    if rng.random() < 0.5:
        word = rng.choice(tuple(WORDS))
        spoken, count = word, WORDS[word]
    else:
        count = rng.randint(2, 99)
        spoken = str(count)
    sentences = [s.format(n=spoken, **facts) for s in _sentences(pool, rng)]
    return {
        "prompt": " ".join(s[0].upper() + s[1:] for s in sentences),
        "completion": f"item: {facts['item']} | count: {count} | to: {facts['to']} | by: {facts['by']}",
    }


def _sentences(pool: Pool, rng: random.Random) -> list[str]:
    """The four facts in one to three sentences of any order, with up to two that say nothing."""
    if rng.random() < 0.25:
        body = [rng.choice(pool.whole)]
        opened = closed = False
    else:
        if rng.random() < 0.5:
            body = [rng.choice(pool.ask_send)]
        else:
            body = [rng.choice(pool.ask), rng.choice(pool.send)]
            if rng.random() < 0.25:
                body.reverse()
        opened = rng.random() < 0.5
        closed = not opened
    if rng.random() < 0.5:
        body.insert(rng.randint(0, len(body)), rng.choice(pool.idle))
    if opened:
        body.insert(0, rng.choice(pool.open_by))
    elif rng.random() < 0.3:
        body.insert(0, rng.choice(pool.hello))
    if closed:
        body.append(rng.choice(pool.close_by))
    return body


def rows(pool: Pool, n: int, seed: int) -> list[dict[str, str]]:
    """n different rows."""
    rng = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < n:
        made = row(pool, rng)
        found.setdefault(made["prompt"], made)
    return list(found.values())


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, pool, n, seed in (("train", TRAIN, TRAIN_ROWS, SEED), ("valid", VALID, VALID_ROWS, SEED + 1)):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows(pool, n, seed))
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{out / f'{name}.jsonl'}: {n} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "demo")
