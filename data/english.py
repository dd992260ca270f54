# SPDX-License-Identifier: Apache-2.0
"""Lists of English words for [`~agevlm.data.phrases`]: the closed classes whole, and of the open ones what captions and answers use.

A word in no list is a noun. So a list has the words that are seldom nouns, and a common noun such as `park` or `light` is in none, though
it can be a verb or an adjective.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("""
a an the this that these those my your his her its our their some any no every each either neither both all many much more most few fewer
several such another other various numerous countless multiple single whole entire only own certain additional same different half zero one
two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty hundred hundreds thousand thousands
dozen dozens first second third fourth fifth last next what which whose class category type kind sort brand
""")
"""And what stands before a noun as they do: "objects of the class dog"."""
ARTICLES = _words("a an the this that these those my your his her its our their no another")
PREPOSITIONS = _words("""
of in on at by for with without from into onto toward towards through across along around about above below beneath under underneath over
behind beside besides between among amongst amid amidst against near past up down off out inside outside within throughout during before
after since until till upon via per like unlike despite than as alongside atop opposite beyond aboard except regarding due
""")
CONJUNCTIONS = _words(
    "and or but nor so yet if because although though while whereas unless when where why how whether plus"
)
PRONOUNS = _words("""
i you he she it we they me him us them who whom myself yourself himself herself itself ourselves themselves someone anyone everyone nobody
somebody anybody everybody something anything everything nothing ones none there here mine yours hers ours theirs others
""")
BE = _words(
    "is are was were be been being am isn aren wasn weren s re seem seems seemed appear appears look looks become becomes feel feels"
)
AUXILIARIES = BE | _words("""
has have had having do does did doing don doesn didn can could will would shall should may might must cannot couldn wouldn won shouldn hasn
haven hadn ve ll d m t
""")
ADVERBS = _words("""
not very too also just quite rather really still already almost always often never ever sometimes usually now then soon again once twice
together apart away forward forwards backward backwards upward upwards downward downwards sideways ahead nearby indoors outdoors well even
however therefore thus hence instead perhaps maybe please yes ok okay overall meanwhile moreover furthermore elsewhere everywhere somewhere
anywhere later earlier else enough far farther further alone aside underway early otherwise anyway nevertheless nonetheless yet altogether
upside etc
""")

# Seldom nouns. Those that are nouns as well are understood by the words before them.
VERBS = _words("""
sit stand walk run ride hold wear carry look stare gaze glance watch play eat drink throw catch kick hit swing jump leap fly swim surf ski
skate push pull drag lean lie lay rest hang perch bend kneel crouch squat pose smile laugh cry talk speak listen read write draw paint cook
bake cut chop pour serve prepare make take give get put set use try help show contain feature include depict display suggest indicate imply
convey demonstrate highlight reflect create provide ensure allow enable require need want love enjoy prefer know think believe hear see find
keep let begin start stop continue finish go come move travel drive turn enter cross pass follow chase lead approach reach climb descend
fall rise drop float sail paddle dive bounce roll slide spin fill cover surround separate connect attach touch grab grasp grip pet feed
graze wait sleep nap relax perform compete celebrate wave protect determine consider describe explain respond reply choose select identify
compare analyze share offer add fit shoot strike bite lick sniff chew brush comb wash clean dry wipe sweep hug kiss shake greet meet join
gather hide seek peek peer blow burn shine glow grow bloom crash break buy sell pay examine inspect observe notice live stay remain happen
occur belong depend vary extend stretch spread open shut attempt tend consist represent resemble mean refer relate support deliver explore
wander stroll march dance sing teach learn study charge hover soar dip spray pick peel squeeze toss dribble tackle win lose ask tell say
call bring send leave lift raise load unload steer navigate balance skateboard snowboard swoop sip stir grill decorate adorn arrange
assemble wrap work act behave interact engage communicate contribute enhance emphasize evoke maintain avoid prevent assist promote capture
involve focus cause result stem express face interpret infer assume conclude visit attend practice pause proclaim tilt wag bark yawn pretend
showcase differ invite cater encounter thrive manage regulate overcome stimulate socialize participate decide elaborate encourage facilitate
foster prompt blend admire accompany illustrate portray possess exhibit signify symbolize inspire appeal expose reduce increase improve
affect occupy operate produce receive reveal replace remove return secure steal strive struggle submerge succeed suffer trot undergo utilize
yield expect recognize realize anticipate accommodate indulge
""")
MODALS = _words("can could will would shall should may might must do does did don doesn didn couldn wouldn shouldn t")
BEFORE_TO = _words(
    "next close closer adjacent due according addition similar attached connected tied belonging leads leading leads related up down"
)
"""Words after which "to" begins no infinitive."""
IMPERATIVES = _words("list name count point note explain answer state outline summarize caption zoom look")
"""Verbs at the beginning of a sentence that are nouns elsewhere."""
PARTICIPLES = _words("""
sat stood ran rode ridden held wore worn ate eaten drank drunk threw thrown caught hit swung flew flown swam hung lain bent knelt spoke
spoken wrote written drew drawn cut made took taken gave given got gotten set showed shown kept let began begun went gone came drove driven
rose risen fell fallen slid spun fed slept won lost found seen known thought felt heard meant shot struck bit bitten blew blown grew grown
broke broken shone built bought sold paid met hid hidden sang sung taught told said lit stuck laid done put shut spread split led left sent
brought torn tied lied used chosen woven beaten hurt sewn sunk swept understood upset wound frozen forgotten sought
""") - {"left"}
ADJECTIVES = _words("""
red yellow green blue purple pink brown black white gray grey tan beige silver golden maroon teal turquoise violet big large small little
tiny huge giant enormous massive long short tall high low wide narrow thick thin deep shallow flat round square old young new modern ancient
vintage antique elderly older younger bigger biggest larger largest smaller smallest taller tallest shorter longer longest nicer better best
worse worst hot cold warm cool dry wet clean dirty empty full open closed bright dark heavy soft hard smooth rough sharp straight curved
happy sad angry beautiful pretty cute nice good great bad main major minor similar common unusual typical traditional natural fresh ripe raw
busy quiet calm peaceful comfortable cozy casual formal elegant clear cloudy sunny rainy foggy snowy grassy sandy rocky dusty muddy rusty
shiny furry fluffy hairy curly messy leafy woolly friendly lovely lonely hungry thirsty sleepy healthy fancy wooden metallic woolen rural
urban residential commercial industrial public private local popular vibrant visible available possible impossible able unable ready safe
important necessary essential crucial significant interesting exciting appropriate suitable sure aware asleep awake alive upright present
absent double pregnant blond blonde bald barefoot topless shirtless european american asian african chinese japanese italian french mexican
electric electronic digital mechanical medical professional historic historical tropical overcast unripe vacant rectangular circular oval
triangular transparent translucent plain solid multicolored multi-colored one-story two-story stainless crispy creamy spicy sweet sour
bitter frozen loose tight steep strong weak fast slow crowded relaxed excited tired focused likely unlikely true false correct incorrect
right-handed left-handed male female nude naked dead live rich poor inner outer upper lower front-facing middle-aged free gentle mature
overhead lush scenic outdoor indoor valuable rare unique immersive practical primary secondary proper reasonable accurate aesthetic
efficient potential visual serene picturesque closer farther nearer particular specific individual general overall social personal cultural
recreational artistic creative complex simple basic special mixed additional diverse wide-ranging comprehensive detailed domestic exotic
moderate final initial previous current recent heavier lighter darker brighter warmer cooler higher deeper wider stronger easier harder
safer healthier happier active attractive impressive expensive inexpensive effective decorative protective supportive positive negative
secure mental emotional psychological naturalistic prone adjacent predominant softer nutritious severe romantic dramatic dynamic energetic
static identical numerical vertical horizontal diagonal convenient prior quirky grand noble ideal equal
""")
ING_NOUNS = _words("""
building buildings painting paintings drawing drawings clothing ceiling ceilings railing railings ring rings king kings string strings wing
wings awning awnings lightning pudding earring earrings sling spring frosting icing stuffing topping toppings dressing herring duckling
ducklings sibling siblings siding carving carvings molding bedding seating lighting viking crossing stocking stockings piercing wiring
paving flooring landing
""")
ING_MODIFIERS = _words("""
parking dining living swimming frying cutting sewing washing ironing fishing rocking baking sleeping shopping skiing surfing bowling hiking
riding running racing wedding walking cooking mixing measuring dressing waiting landing drying boxing changing driving training vending
filing hunting serving rolling sailing
""")
"""Before a noun they are a part of it: `parking lot`."""
COLOR_NOUNS = _words("orange gold cream rose peach")
COMPOUND_PARTICIPLES = _words(
    "covered filled lined topped fronted shaped colored coloured flavored themed sized styled framed"
)
ED_NOUNS = _words(
    "bed beds shed sheds sled sleds seed seeds weed weeds reed bobsled moped steed breed seaweed flatbed"
)
ABLE_NOUNS = _words("table vegetable cable stable timetable turntable constable bible")
LY_NOUNS = _words("butterfly dragonfly family jelly belly lily bully trolley ply assembly italy dolly potbelly")

# Nouns that name nothing an image can show a mask of: its parts and places, times, ideas. Singular.
NOT_VISIBLE = _words("""
image photo photograph picture photography scene view background foreground left right middle center centre front back side top bottom
corner edge end beginning area region part portion section place location position direction distance way level angle close-up closeup shot
frame setting surrounding environment atmosphere ambiance ambience mood perspective focus composition subject theme element detail feature
aspect factor context content caption description question answer word phrase letter option choice sentence paragraph example instance fact
reason purpose goal idea thought concept topic point issue problem solution challenge result effect impact cause object item thing stuff
entity number amount quantity lot variety majority minority rest total count range series time day night morning afternoon evening noon
moment hour minute week month year season spring summer autumn fall winter today tomorrow yesterday dusk dawn past present future date age
period weekend holiday birthday life event occasion experience adventure trip journey vacation tour ride walk run jump trick stunt move turn
game match competition tournament contest race sport play practice lesson class activity action task job work effort attempt progress
process procedure method technique strategy approach plan skill talent ability power energy strength speed balance care caution attention
interest love joy fun pleasure happiness excitement comfort peace calm relaxation fear danger risk hazard safety security trust confidence
support help assistance aid service benefit advantage convenience health hygiene beauty charm elegance style design color colour shade hue
tone size shape form height width length weight depth texture material quality value cost price sense feeling emotion sound noise music
smell scent taste flavor heat warmth cold temperature weather condition climate air wind breeze addition order use usage role nature culture
history tradition custom habit routine lifestyle identity personality attitude behavior behaviour manner mode respect connection bond
contact contrast mix blend combination difference comparison harmony symmetry space gap capacity access opportunity possibility chance
likelihood potential tendency trend need want desire wish hope dream request demand requirement rule law regulation policy guideline advice
suggestion recommendation tip hint clue evidence proof indication information data knowledge story narrative message meaning reference title
name brand type kind sort category term language english conversation discussion chat talk speech interview joke laugh smile expression
gesture pose posture stance gaze look glance fashion break nap sleep breath bite sip dinner lunch breakfast brunch mealtime bedtime
dinnertime lunchtime daytime nighttime business company organization industry economy government politics education research study science
technology art math arithmetic exercise fitness training workout drill maintenance repair construction production development growth change
transport transportation commute travel tourism leisure recreation entertainment performance show celebration ceremony festival wedding
visit stay arrival departure arrangement layout preparation presence absence existence lack appearance placement surroundings vicinity
proximity outdoors indoors outside inside world universe earth country nation state continent downtown community society population public
one other another something nothing anything everything someone anyone nobody who what none self yes no maybe true false unknown
unanswerable ocr token coordinate pixel format instruction prompt response reply json summary overview conclusion analysis interpretation
impression guess opinion viewpoint insight observation inference assumption hypothesis mid-air midair motion movement takeoff take-off
stride pace grip hold touch reach catch throw kick hit swing pitch serve score lead win loss victory defeat success failure achievement
memory surprise curiosity boredom stress anxiety anger sadness pride freedom luck fate faith spirit soul mind consciousness sunlight
daylight lighting darkness brightness visibility mile kilometer inch degree percent percentage dollar cent euro pound am pm gmt hustle
bustle tranquility serenity nostalgia serendipity whimsy obstacle spot resource member purchase damage aftermath storage trade delivery
playtime ease household sunburn heatstroke characteristic aesthetic appeal diet luxury grandeur completion anticipation craftsmanship
durability rarity richness sweetness concern harm discomfort accident incident sentiment agreement approval need precaution consideration
factor mindset session routine
""")
# They end as abstract nouns do, but can be seen. Singular.
VISIBLE = _words("""
station substation reflection decoration intersection vegetation plantation mansion television cushion ration lotion potion crustacean
apartment equipment instrument monument ornament garment basement pavement attachment compartment document cement parchment harness lioness
waitress city facility ambulance entrance appliance conveyance fence audience residence ship spaceship battleship airship steamship warship
neighborhood hood motorhood refreshment condiment embankment installation medallion pavilion stallion carnation
""")
ABSTRACT_ENDINGS = (
    "tion", "sion", "ment", "ness", "ity", "ance", "ence", "ship", "ism", "hood", "ancy", "ency", "ology", "graphy", "dom",
)  # fmt: skip

# What is measured is seen in the same pixels: "a group of people" is one phrase, where no determiner follows "of".
MEASURES = _words("""
group bunch pair pile stack herd flock crowd row line slice piece glass cup bowl plate bottle bag box basket jar can vase bouquet loaf
cluster set collection mug pot bucket tray pack team field body patch bed sheet layer pool stretch strip platter carton crate swarm school
bundle bale block chunk stick scoop serving pitcher keg barrel roll heap mound stream
""")
QUANTITIES = _words(
    "couple lot lots number variety majority plenty kind kinds type types sort part parts rest assortment array series range"
)
"""Before "of" they count what follows, and are no phrase of their own."""
# Games and music are played, not seen.
PLAYS = _words("play plays playing played")
PLURALS = _words("people men women children feet teeth sheep mice geese police cattle fish deer persons")

IDIOMS = (
    r"(?:at|towards?|into|for|to|facing) the camera",
    r"in the (?:air|mood|process|eyes of|shape of|form of)",
    r"on the (?:other|one) hand",
    r"at hand|hand in hand|side by side|face to face|on foot",
    r"close[- ]up|(?:cut )?in half|at (?:least|most)",
    r"in (?:this|that|any|some) cases?|in case|in particular",
    r"keep(?:ing)? (?:an eye|track)|tak(?:e|ing) note",
)
"""Nouns in them name nothing."""

FOREIGN = _words("""
le la les un une des du et est dans sur avec qui que il elle sont der das ein eine einen einem und ist mit auf nicht dem von
dass el los las una en y con para por del es lo gli della di che nel sono het een op zijn att och som det ett em uma da ao na
nie jest z w se jsou je
""")
"""Function words of other languages that are no English words."""
