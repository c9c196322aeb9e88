"""The sentences of word problems: scenes, and what can happen in each.

A line is an operation and a sentence. In what follows, v is the number that the story is about:

======  ==========================  ======================================
=       v is n                      the first sentence; no calculation
=+      a + b                       the first sentence
=*      a * b                       the first sentence
+  -    v + n, v - n
+*  -*  a * b, then v + it, v - it
*  /    v * k, v / k                ``{times}`` or ``{share}`` say the k
-/      v / k, then v - it          ``{share}`` says the k
?       the question is v           the last sentences; no calculation
?/  ?*  v / n, v * n                the last sentences
?-      n - v                       the last sentences
?++     v + n, then v + it          the last sentences: two have so many
?+*     v * k, then v + it          the same; ``{times}`` says the k
======  ==========================  ======================================

Placeholders: ``{name}`` of who or what it is about and ``{other}`` of another person; ``{s}`` the
name or a pronoun, ``{he}`` the pronoun, ``{his}`` the possessive; ``{items}`` what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DISTRACTORS", "LINKS", "NAMES", "SCENES", "Line", "Scene"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a scene.

    Attributes:
        operation: Its first word.
        text: The rest, a template.
    """

    operation: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where stories take place.

    Attributes:
        items: What may be counted.
        places: What it may be about; a person if there are none.
        openings: Lines that begin with ``=``.
        moves: Lines from the middle of a story.
        endings: Lines that begin with ``?``.
    """

    items: tuple[str, ...]
    places: tuple[str, ...]
    openings: tuple[Line, ...]
    moves: tuple[Line, ...]
    endings: tuple[Line, ...]


def _scene(lines: str, *, items: str, places: str = "") -> Scene:
    parsed = [Line(operation=word, text=text) for word, text in map(_split, _lines(lines))]
    return Scene(
        items=tuple(items.split(", ")),
        places=tuple(places.split(", ")) if places else (),
        openings=tuple(line for line in parsed if line.operation[0] == "="),
        moves=tuple(line for line in parsed if line.operation[0] in "+-*/"),
        endings=tuple(line for line in parsed if line.operation[0] == "?"),
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _split(line: str) -> tuple[str, str]:
    word, _, text = line.partition(" ")
    return word, text


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = {
    "she": _names("Anna Mia Lena Sara Emma Nora Ruth Grace Ines Maya Alice Clara Priya Zoe"),
    "he": _names("Ben Tom Leo Omar Paul Jack Noah Ravi Sam Felix Ivan Hugo Karl Yusuf"),
}
"""Names by pronoun."""

LINKS = ("", "", "", "", "", "", "Then ", "Later ", "After that, ", "Next, ")
"""What a sentence may begin with, if its line begins with a placeholder."""

DISTRACTORS = (
    "{other} is {n} years old.",
    "The walk home takes {n} minutes.",
    "It is {n} degrees outside.",
    "{other} lives {n} streets away.",
    "It is {n} o'clock.",
    "{other} has {n} cousins.",
    "The radio plays for {n} minutes.",
    "{other}'s favourite number is {n}.",
    "There are {n} days left until the holidays.",
    "{other} slept for {n} hours.",
)
"""Sentences whose numbers, from 2 to 12, do not matter."""

_COLLECTION = """
= {name} has {n} {items}.
= {name} starts the week with {n} {items}.
=+ {name} has {a} {items} in a drawer and {b} {items} in a box.
=+ {name} has {a} old {items} and {b} new {items}.
=* {name} buys {a} bags with {b} {items} in each.
=* {name} has {a} boxes of {b} {items}.
+ {s} finds {n} more {items}.
+ {s} buys {n} more {items}.
+ {other} gives {name} {n} {items}.
+ {s} gets {n} {items} as a present.
- {s} gives {n} {items} to {other}.
- {s} loses {n} {items}.
- {s} sells {n} {items}.
- {n} of the {items} break and are thrown away.
+* {s} buys {a} packs of {b} {items}.
+* {a} friends give {name} {b} {items} each.
-* {s} gives {b} {items} to each of {his} {a} cousins.
-* {s} sells {a} bags of {b} {items}.
* {s} collects until {he} has {times} as many {items} as before.
/ {s} keeps only {share} of {his} {items}.
-/ {s} gives {share} of {his} {items} to {other}.
-/ {s} swaps {share} of {his} {items} for a book.
? How many {items} does {name} have now?
? How many {items} are left with {name}?
?/ {s} puts all the {items} into bags of {n}. How many bags does {he} fill?
?/ {s} shares all the {items} equally among {n} friends. How many {items} does each friend get?
?* {s} sells all the {items} for {n} dollars each. How many dollars does {he} get?
?- {s} wants to have {n} {items}. How many more does {he} need?
?++ {other} has {n} more {items} than {name}. How many {items} do they have together?
?+* {other} has {times} as many {items} as {name}. How many {items} do they have together?
"""

SCENES = (
    _scene(
        _COLLECTION,
        items="marbles, stickers, stamps, postcards, shells, buttons, beads, coins, toy cars, "
        "trading cards, badges, crayons, pencils, balloons, pebbles",
    ),
    _scene(
        """
        = {name} has {n} dollars.
        = {name} has saved {n} dollars.
        =+ {name} has {a} dollars in a purse and {b} dollars at home.
        =+ {name} gets {a} dollars from an aunt and {b} dollars from an uncle.
        =* {name} works {a} hours for {b} dollars an hour.
        =* {name} saves {b} dollars a week for {a} weeks.
        + {s} earns {n} dollars for washing cars.
        + {s} finds {n} dollars in an old coat.
        + {s} gets {n} dollars for {his} birthday.
        - {s} buys a bag for {n} dollars.
        - {s} spends {n} dollars on lunch.
        - {s} lends {other} {n} dollars.
        - A train ticket costs {name} {n} dollars.
        +* {s} mows {a} lawns for {b} dollars each.
        +* {s} sells {a} old books for {b} dollars each.
        -* {s} buys {a} cinema tickets at {b} dollars each.
        -* {s} pays {b} dollars for each of {a} lessons.
        * {s} works through the summer and has {times} as much money as before.
        / {s} spends so much at a fair that only {share} of {his} money is left.
        -/ {s} gives {share} of {his} money to a charity.
        -/ {s} pays {share} of {his} money for a pair of shoes.
        ? How many dollars does {name} have now?
        ? How much money, in dollars, does {name} have in the end?
        ?/ {s} spends all of it on notebooks that cost {n} dollars each. How many does {he} get?
        ?/ {s} divides all of it equally among {n} children. How many dollars does each child get?
        ?- A bicycle costs {n} dollars. How many more dollars does {name} need to buy it?
        ?++ {other} has {n} dollars more than {name}. How many dollars do they have together?
        ?+* {other} has {times} as many dollars as {name}. How many dollars do they have together?
        """,
        items="dollars",
    ),
    _scene(
        """
        = {name} has {n} {items} in the morning.
        = {name} opens with {n} {items} on the shelves.
        =* {name} bakes {a} trays of {b} {items}.
        =* {name} starts with {a} shelves of {b} {items}.
        =+ {name} has {a} {items} from yesterday and {b} fresh {items}.
        + The oven gives {n} more {items}.
        + A helper brings {n} more {items}.
        - {s} sells {n} {items} in an hour.
        - {n} {items} are burnt and cannot be sold.
        - A school orders and takes {n} {items}.
        +* {a} trays of {b} {items} come out of the oven.
        -* {a} customers buy {b} {items} each.
        -* {s} sends {a} boxes of {b} {items} to a hotel.
        * {s} bakes so long that there are {times} as many {items} as before.
        / At closing time only {share} of the {items} are left.
        -/ A café takes {share} of the {items}.
        ? How many {items} does {name} have now?
        ? How many {items} are there in the end?
        ?/ The {items} are packed into boxes of {n}. How many boxes are there?
        ?* All the {items} are sold for {n} dollars each. How many dollars does {name} take?
        ?- {s} needs {n} {items} for a wedding. How many more have to be baked?
        """,
        items="rolls, muffins, pies, buns, bagels, cookies, cupcakes",
        places="the bakery, the corner bakery, the café, the station bakery, the school kitchen",
    ),
    _scene(
        """
        = {name} has {n} {items} in stock.
        =+ {name} has {a} {items} in the window and {b} {items} in the back room.
        =* {name} gets {a} crates of {b} {items}.
        + A delivery brings {n} {items}.
        + Customers return {n} {items}.
        - {s} sells {n} {items} in a day.
        - {n} {items} are damaged and sent back.
        - A customer orders and gets {n} {items}.
        +* A lorry brings {a} crates of {b} {items}.
        -* {s} sells {b} {items} a day for {a} days.
        -* {a} schools buy {b} {items} each.
        * {s} orders so many that there are {times} as many {items} in stock as before.
        / After a big sale only {share} of the {items} remain.
        -/ {s} sends {share} of the {items} to another shop.
        ? How many {items} are in stock now?
        ? How many {items} does {name} have left?
        ?/ The {items} are put on shelves, {n} on each. How many shelves are needed?
        ?* The {items} are worth {n} dollars each. How many dollars are they worth together?
        ?- {s} wants to have {n} {items} in stock. How many more must it order?
        """,
        items="lamps, books, umbrellas, radios, puzzles, backpacks, mugs, scarves, clocks, kettles",
        places="the shop, the corner shop, the museum shop, the warehouse, the market hall",
    ),
    _scene(
        """
        = {name} leaves the depot with {n} passengers.
        = There are {n} passengers on {name}.
        =+ On {name} there are {a} adults and {b} children, all of them passengers.
        =* At each of {a} stops {b} passengers get on {name}, which was empty before.
        + {n} passengers get on at the market.
        + At the school {n} passengers get on.
        - {n} passengers get off at the bridge.
        - At the hospital {n} passengers get off.
        +* At each of {a} stops {b} passengers get on.
        -* At each of {a} stops {b} passengers get off.
        * At the stadium so many get on that there are {times} as many passengers as before.
        / At the main station many get off, and only {share} of the passengers stay.
        -/ At the harbour {share} of the passengers get off.
        ? How many passengers are on {name} now?
        ?* Each passenger now on board pays {n} dollars. How many dollars do they pay together?
        ?/ At the last stop all of them leave in groups of {n}. How many groups are there?
        ?- There are {n} seats. How many seats are free?
        """,
        items="passengers",
        places="the bus, the tram, the night train, the ferry, the airport bus, the mountain train",
    ),
    _scene(
        """
        = {name} picks {n} {items}.
        =+ {name} picks {a} {items} before lunch and {b} {items} after lunch.
        =* {name} picks {b} {items} from each of {a} trees.
        =* {name} fills {a} baskets with {b} {items} each.
        + {s} picks {n} more {items}.
        + {other} brings {n} {items} from another garden.
        - {s} eats {n} {items}.
        - {n} {items} are rotten and are thrown away.
        - {s} uses {n} {items} for a cake.
        +* {s} picks {b} {items} from each of {a} small trees.
        -* {s} gives {a} neighbours {b} {items} each.
        -* {s} makes {a} jars of jam with {b} {items} in each.
        * {s} goes on picking until there are {times} as many {items} as before.
        / Birds come, and only {share} of the {items} are left.
        -/ {s} sells {share} of the {items} at the market.
        ? How many {items} does {name} have now?
        ? How many {items} are left?
        ?/ {s} packs all the {items} into baskets of {n}. How many baskets does {he} fill?
        ?* Each of the {items} weighs {n} grams. How many grams do they weigh together?
        ?- {s} needs {n} {items} for the feast. How many more does {he} have to pick?
        ?++ {other} picks {n} more {items} than {name} has now. How many do they have together?
        ?+* {other} has {times} as many {items} as {name}. How many {items} do they have together?
        """,
        items="apples, plums, pears, lemons, peaches, cherries, oranges, figs",
    ),
    _scene(
        """
        = {name} has a journey of {n} kilometres to go.
        = {name} plans a bicycle tour of {n} kilometres.
        =+ {name} has to go {a} kilometres by train and {b} kilometres by bus.
        =* {name} plans a tour of {a} days with {b} kilometres a day.
        + A closed bridge makes the way {n} kilometres longer.
        + {s} decides to visit a castle, which adds {n} kilometres to the way.
        - {s} covers {n} kilometres without a break.
        - {s} covers {n} kilometres and takes a rest.
        - A short cut makes the way {n} kilometres shorter.
        -* {s} travels for {a} hours at {b} kilometres an hour.
        +* {a} detours add {b} kilometres each to the way.
        -/ {s} covers {share} of the remaining way.
        / By night only {share} of the remaining way is still ahead.
        ? How many kilometres are still to go?
        ? How long is the remaining way, in kilometres?
        ?/ {s} covers the rest at {n} kilometres an hour. How many hours does that take?
        ?/ {s} splits the rest into equal parts for {n} days. How many kilometres is that a day?
        ?* The rest costs {n} dollars a kilometre. How many dollars does it cost?
        """,
        items="kilometres",
    ),
    _scene(
        """
        = {name} bakes {n} {items}.
        = A recipe gives {name} {n} {items}.
        =* {name} bakes {a} trays with {b} {items} on each.
        =+ {name} bakes {a} {items} with nuts and {b} {items} without.
        + {s} bakes {n} more {items}.
        + {other} brings {n} {items}.
        - {s} burns {n} {items} and throws them away.
        - The children eat {n} {items}.
        - {s} sets {n} {items} aside for {other}.
        +* {s} bakes {a} more trays of {b} {items}.
        -* {a} guests eat {b} {items} each.
        * {s} repeats the recipe until there are {times} as many {items} as before.
        / The guests leave only {share} of the {items}.
        -/ {s} freezes {share} of the {items}.
        ? How many {items} does {name} have now?
        ? How many {items} are left on the table?
        ?/ {s} puts the {items} on plates, {n} on each. How many plates does {he} need?
        ?/ {s} shares the {items} equally among {n} guests. How many {items} does each guest get?
        ?* Each of the {items} needs {n} grams of sugar. How many grams do they need together?
        ?- {s} wants {n} {items} for the party. How many more must {he} bake?
        """,
        items="cookies, pancakes, waffles, muffins, scones, dumplings, tarts",
    ),
    _scene(
        """
        = {name} holds {n} litres of water.
        =+ {name} is filled with {a} litres of rain water and {b} litres of tap water.
        =* A pump fills {name} for {a} minutes with {b} litres a minute.
        + Rain adds {n} litres.
        + Somebody pours in {n} litres.
        - {n} litres are used for the flowers.
        - {n} litres leak out through a crack.
        +* A hose runs for {a} minutes and adds {b} litres a minute.
        -* A leak takes {b} litres a day for {a} days.
        -* {a} cows drink {b} litres each.
        * After a storm it holds {times} as much water as before.
        / In the heat the water falls to {share} of what it was.
        -/ The gardener uses {share} of the water.
        ? How many litres of water does {name} hold now?
        ?/ The water is filled into buckets of {n} litres. How many buckets are filled?
        ?* The water costs {n} cents a litre. How many cents does it cost?
        ?- {s} can hold {n} litres. How many more litres fit in?
        """,
        items="litres",
        places="the tank, the garden pond, the barrel, the pool, the cistern",
    ),
    _scene(
        """
        = {name} still has {n} pages of a book to read.
        =+ {name} has to read {a} pages of history and {b} pages of biology.
        =* {name} has to read {a} chapters of {b} pages.
        + {his} teacher adds {n} pages.
        + {s} decides to read {n} pages of notes as well.
        - {s} reads {n} pages.
        - {s} reads {n} pages on the bus.
        - {s} skips {n} pages of pictures.
        -* {s} reads {b} pages an hour for {a} hours.
        -* {s} reads {b} pages on each of {a} days.
        +* {s} has to read {a} more articles of {b} pages each.
        / At the weekend {s} reads until only {share} of the pages are left.
        -/ {s} reads {share} of the remaining pages.
        ? How many pages does {name} still have to read?
        ? How many pages are left?
        ?/ {s} reads the rest in {n} equal parts. How many pages are in each part?
        ?/ {s} reads {n} pages a day from now on. How many days does the rest take?
        ?* {s} needs {n} minutes for each of the remaining pages. How many minutes is that?
        """,
        items="pages",
    ),
    _scene(
        """
        = {name} has {n} points.
        = {name} wins the first round with {n} points.
        =+ {name} scores {a} points in the first round and {b} points in the second.
        =* {name} hits the target {a} times for {b} points each.
        + {s} scores {n} points.
        + {s} gets a bonus of {n} points.
        - {s} loses {n} points for a mistake.
        - {s} pays {n} points for a hint.
        +* {s} wins {a} rounds of {b} points each.
        +* {s} solves {a} puzzles for {b} points each.
        -* {s} makes {a} mistakes that cost {b} points each.
        * A lucky card leaves {name} with {times} as many points as before.
        / An unlucky card leaves {name} with {share} of {his} points.
        -/ {s} has to hand {share} of {his} points to {other}.
        ? How many points does {name} have now?
        ? What is the score of {name} in the end?
        ?/ {s} trades all the points for prizes that cost {n} points each. How many prizes are that?
        ?* Each point is worth {n} cents. How many cents are the points worth?
        ?- To win, {s} needs {n} points. How many points are missing?
        ?++ {other} has {n} more points than {name}. How many points do they have together?
        ?+* {other} has {times} as many points as {name}. How many points do they have together?
        """,
        items="points",
    ),
    _scene(
        """
        = {name} has {n} {items}.
        =+ {name} has {a} young {items} and {b} old {items}.
        =* {name} has {a} fields with {b} {items} on each.
        + {s} buys {n} {items} at the market.
        + {n} {items} are born in spring.
        - {s} sells {n} {items}.
        - {n} {items} run away.
        - {s} moves {n} {items} to another farm.
        +* {s} buys {a} groups of {b} {items}.
        -* {a} farmers buy {b} {items} each.
        * Over the years the herd grows until there are {times} as many {items} as before.
        / {s} grows old and keeps only {share} of the {items}.
        -/ {s} gives {share} of the {items} to {other}.
        ? How many {items} are there now?
        ? How many {items} does {name} have now?
        ?/ {s} puts the {items} into stables, {n} in each. How many stables does {he} need?
        ?* Each of the {items} eats {n} kilograms of hay. How many kilograms do they eat together?
        ?++ {other} has {n} more {items} than {name}. How many {items} do they have together?
        ?+* {other} has {times} as many {items} as {name}. How many {items} do they have together?
        """,
        items="sheep, goats, cows, horses, donkeys",
    ),
    _scene(
        """
        = {name} has {n} {items}.
        =+ {name} has {a} {items} on the ground floor and {b} {items} upstairs.
        =* {name} has {a} rooms with {b} {items} in each.
        + {s} is given {n} {items}.
        + {s} buys {n} new {items}.
        - {n} {items} are too old and are thrown away.
        - {s} lends {n} {items} to a theatre.
        +* {a} families give {b} {items} each.
        +* {s} orders {a} sets of {b} {items}.
        -* {a} visitors each borrow {b} {items}.
        * A gift leaves {name} with {times} as many {items} as before.
        / After a flood only {share} of the {items} can be kept.
        -/ {share} of the {items} are sold.
        ? How many {items} does {name} have now?
        ?/ The {items} are arranged in rows of {n}. How many rows are there?
        ?* It takes {n} minutes to clean each of the {items}. How many minutes do all of them take?
        ?- {s} wants {n} {items} in all. How many are missing?
        """,
        items="books, chairs, paintings, games, desks, maps",
        places="the library, the school, the museum, the town hall, the club",
    ),
    _scene(
        """
        = {name} plants {n} {items}.
        =* {name} plants {a} rows of {b} {items}.
        =+ {name} plants {a} red {items} and {b} white {items}.
        + {s} plants {n} more {items}.
        + {other} brings {n} {items} in pots.
        - Snails eat {n} {items}.
        - {s} cuts {n} {items} for a vase.
        - {n} {items} do not survive the frost.
        +* {s} plants {a} more rows of {b} {items}.
        -* {s} makes {a} bunches of {b} {items}.
        * By the next year there are {times} as many {items} as before.
        / A hard winter leaves only {share} of the {items}.
        -/ {s} gives {share} of the {items} to {other}.
        ? How many {items} are in the garden now?
        ? How many {items} does {name} have now?
        ?/ {s} ties all the {items} into bunches of {n}. How many bunches does {he} get?
        ?* {s} sells all the {items} for {n} cents each. How many cents does {he} get?
        ?++ {other} has {n} more {items} than {name}. How many {items} do they have together?
        """,
        items="tulips, roses, daisies, lilies, sunflowers",
    ),
)
"""Every scene; each story takes place in one."""
