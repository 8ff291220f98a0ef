"""Everyday facts for the demo's questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FACTS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """Questions of one kind: `{subject}` and `{fact}` are the keys and values of `facts`."""

    questions: tuple[str, str, str]
    answer: str
    facts: dict[str, str]


def _facts(text: str) -> dict[str, str]:
    pairs = (line.split(":") for line in text.strip().split("|"))
    return {subject.strip(): fact.strip() for subject, fact in pairs}


JOBS = Kind(
    ("What does {subject} do?", "Can you tell me what {subject} does all day?", "Describe the work of {subject}."),
    "{subject} {fact}.",
    _facts(
        "a baker: bakes bread and cakes|a farmer: grows crops and keeps animals|a pilot: flies planes|a nurse: cares for the sick|"
        "a teacher: helps people learn|a plumber: repairs water pipes|a tailor: makes and mends clothes|a butcher: prepares and sells meat|"
        "a librarian: looks after books|a carpenter: builds things from wood|a firefighter: puts out fires|a chef: cooks in a restaurant|"
        "a dentist: looks after teeth|a gardener: takes care of plants|a mechanic: repairs cars|a judge: decides cases in court|"
        "a painter: paints walls or pictures|a sailor: works on a ship|a singer: performs songs|a writer: writes books|"
        "a barber: cuts hair|a florist: sells flowers|a miner: digs for minerals|a fisherman: catches fish|an architect: designs buildings"
    ),
)
ANIMALS = Kind(
    ("What does {subject} eat?", "I would like to know what {subject} eats.", "Tell me about the diet of {subject}."),
    "{subject} eats {fact}.",
    _facts(
        "a cow: grass|a panda: bamboo|a squirrel: nuts and seeds|a koala: eucalyptus leaves|a lion: meat|a rabbit: grass and vegetables|"
        "a horse: hay and grass|a penguin: fish|an owl: mice and insects|a frog: insects|a bee: nectar and pollen|a giraffe: leaves from trees|"
        "a seal: fish and squid|a wolf: deer and other prey|a hamster: seeds and grains|a goat: grass and shrubs|a spider: insects|"
        "a shark: fish and seals|a duck: water plants and insects|a camel: dry grass and thorny plants|a bat: insects or fruit|"
        "a hedgehog: insects and worms|an eagle: fish and small animals|a deer: leaves and grass|a parrot: seeds and fruit"
    ),
)
TOOLS = Kind(
    ("What is {subject} used for?", "Why would someone need {subject}?", "Explain the purpose of {subject}."),
    "{subject} is used for {fact}.",
    _facts(
        "a hammer: driving nails|a saw: cutting wood|an umbrella: staying dry in the rain|a ladder: reaching high places|a needle: sewing cloth|"
        "a compass: finding direction|a thermometer: measuring temperature|a kettle: boiling water|a broom: sweeping floors|a scale: weighing things|"
        "a shovel: digging holes|a telescope: looking at distant objects|a microscope: seeing very small things|a whistle: making a loud signal|"
        "a towel: drying things|a pillow: resting the head|a candle: giving light|a wallet: carrying money|a map: finding the way|"
        "a clock: telling the time|a rake: gathering leaves|an anchor: holding a ship in place|a sponge: wiping surfaces|a key: opening locks|"
        "a basket: carrying things"
    ),
)
CAPITALS = Kind(
    ("What is the capital of {subject}?", "Which city is the capital of {subject}?", "Tell me the capital of {subject}."),
    "The capital of {subject} is {fact}.",
    _facts(
        "France: Paris|Italy: Rome|Spain: Madrid|Japan: Tokyo|Egypt: Cairo|Norway: Oslo|Greece: Athens|Peru: Lima|Cuba: Havana|Austria: Vienna|"
        "Portugal: Lisbon|Ireland: Dublin|Poland: Warsaw|Hungary: Budapest|Kenya: Nairobi|Thailand: Bangkok|Sweden: Stockholm|Finland: Helsinki|"
        "Chile: Santiago|Denmark: Copenhagen|Russia: Moscow|Germany: Berlin|Belgium: Brussels|Mexico: Mexico City|South Korea: Seoul"
    ),
)

FACTS = (JOBS, ANIMALS, TOOLS, CAPITALS)
