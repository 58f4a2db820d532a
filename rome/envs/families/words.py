"""The pool that every name in a procedural task is drawn from.

Short common words whose first three letters all differ and of which none is a part of another: so `grep` for one never
finds another, and a small vocabulary gives each a token of its own.
"""

_POOL = """
acorn amber anchor apple arrow aspen bamboo basil beacon birch bison bloom bonus bridge cabin cactus candle
castle cedar cherry chisel cider daisy delta desert diver donkey dragon drum eagle ebony elbow ember engine
falcon fennel fern fiddle finch flute forest fossil galaxy garden ginger goblin grape guitar hammer harbor hazel
helmet heron honey hornet indigo island ivory jacket jaguar jungle kayak kelp kettle koala ladder lagoon lark
laurel lemon lilac lizard lotus magnet mango maple marble meadow melon mint mirror nectar needle nickel nomad
nutmeg oasis ocean olive onion opal orchid otter oyster paddle panda parrot peach pebble pepper piano pigeon
quill rabbit radish raven ribbon river rocket rubber saddle salmon scarf shadow silver sketch sorbet spider
tango temple ticket tiger timber toast topaz tulip valley vapor velvet violet vortex wagon walnut wander whale
willow window wolf zebra zinc
"""

WORDS: tuple[str, ...] = tuple(_POOL.split())
