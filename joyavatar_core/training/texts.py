"""What the voices say: everyday sentences written for this project, and templates filled with numbers, times and names.

Every sentence belongs to one side for good: a hash of the sentence itself decides whether it is held out.
"""

# ruff: noqa: E501, RUF001 (one sentence a line, in many scripts)

from __future__ import annotations

import re
import zlib

import numpy as np

HELD_OUT_SHARE = 5  # one sentence of five is held out

_SENTENCES = {
    "en": """
Good morning, how are you today?
My mother makes the best apple pie.
Please bring both of the big boxes.
Five fine fish swim in the river.
We have never seen such a beautiful evening.
Bob bought a bike pump from my brother.
Thank you very much for coming.
The baby is sleeping, so please be quiet.
Maybe we should meet before breakfast.
A fast fox fled from a very full farm.
Put the paper plates on top of the piano.
Mum moved my blue lamp from the bedroom.
Who knows where those two shoes are?
I think the weather will be fine this weekend.
She sells fresh fruit at the village fair.
Could you open the window a little?
You won't believe what happened on my way home!
The old bridge was closed because of the storm.
Seven silver spoons lay on the shelf.
Pepper and butter make popcorn better.
He read the whole book in one afternoon.
Wow, what a wonderful view of the ocean!
Let me show you how this machine works.
Every movement of the lips belongs to a sound.
Don't forget to feed the cat and water the plants.
First we wash the vegetables, then we chop them.
Oh no, I have left my phone at the office.
The map above the table shows every path in the park.
Few people have ever proved him wrong.
We choose the music, you choose the food.
Above all, be patient and believe in yourself.
Bumble bees hum above the poppy bed.
Come in, sit down, and tell me about your trip.
Would you rather walk or wait for the bus?
This is the news for today, thank you for watching.
My favourite film has a very funny ending.
Are you sure that this is the right way?
It was raining, but nobody seemed to mind.
I promise to phone you from the airport.
Please speak up, I can hardly hear you.
""",
    "de": """
Guten Morgen, wie geht es dir heute?
Meine Mutter backt am besten Apfelkuchen.
Bitte bring mir beide Bücher mit.
Viele frische Fische schwimmen im Fluss.
Wir haben einen wunderbaren Abend verbracht.
Peter packt am Bahnhof seine braune Mappe.
Vielen Dank, dass ihr alle gekommen seid.
Das Baby schläft, also sei bitte leise.
Morgen früh fahren wir mit dem Bus ans Meer.
Der Bäcker verkauft fünf verschiedene Brote.
Könntest du bitte das Fenster öffnen?
Über dem Tisch hängt eine alte Lampe.
Ich habe mein Telefon im Büro vergessen.
Mama möchte am Mittwoch mit Papa baden gehen.
Wo hast du meine blaue Mütze hingelegt?
Schöne Grüße an deine Schwester und ihren Mann.
Zuerst waschen wir das Gemüse, dann schneiden wir es.
Das war wirklich ein sehr lustiger Film.
Bis bald, und komm gut nach Hause!
Pfeffer und Butter machen die Suppe besser.
Hast du schon gehört, was gestern passiert ist?
""",
    "fr": """
Bonjour, comment allez-vous ce matin ?
Ma mère prépare une belle tarte aux pommes.
Il fait beau, allons nous promener au bord de la mer.
Pouvez-vous ouvrir la fenêtre, s'il vous plaît ?
Mon frère a beaucoup de bons amis.
Le petit bébé dort dans sa chambre bleue.
J'ai oublié mon parapluie dans le bus.
Nous partons demain pour la montagne.
Qui a vu mon chapeau vert ?
Les enfants jouent au ballon devant la maison.
Je voudrais un café et du pain beurré.
Merci beaucoup, vous êtes vraiment gentil.
C'est une histoire vraie, mais personne n'y croit.
Où avez-vous trouvé ce vieux livre ?
""",
    "es": """
Buenos días, ¿cómo está usted?
Mi madre prepara una sopa muy buena.
Por favor, abre un poco la ventana.
El bebé duerme en la habitación pequeña.
Mañana vamos en autobús a la playa.
Me gusta mucho la música de mi abuelo.
¿Dónde has puesto mi sombrero blanco?
Hoy hace buen tiempo y el mar está tranquilo.
Compramos pan, fruta fresca y vino en el mercado.
Muchas gracias por venir a mi fiesta.
Nunca olvidaré aquel viaje por la montaña.
Primero lavamos la verdura y después la cortamos.
Mi hermano busca su teléfono por toda la casa.
¡Qué película tan divertida!
""",
    "it": """
Buongiorno, come sta oggi?
Mia mamma prepara una buona torta di mele.
Per favore, apri un poco la finestra.
Il bambino dorme nella camera blu.
Domani andiamo al mare con tutta la famiglia.
Dove hai messo il mio libro preferito?
Vorrei un bicchiere di vino e un po' di formaggio.
Che bella giornata, usciamo a fare una passeggiata!
Mio fratello beve sempre troppo caffè.
Grazie mille per la vostra visita.
La pioggia è finita e il cielo è pulito.
Prima laviamo la frutta, poi la mangiamo.
Non ho mai visto un film così divertente.
""",
    "pt": """
Bom dia, como está a senhora?
A minha mãe faz um bolo muito bom.
Por favor, abre um pouco a janela.
O bebê dorme no quarto pequeno.
Amanhã vamos de ônibus para a praia.
Onde você colocou o meu livro azul?
Gosto muito da música do meu avô.
Hoje o tempo está bom e o mar está calmo.
Muito obrigado por ter vindo à minha festa.
Compramos pão, fruta fresca e um bom vinho.
O meu irmão perdeu o telefone outra vez.
Que filme tão bonito e divertido!
""",
    "nl": """
Goedemorgen, hoe gaat het met u?
Mijn moeder bakt een lekkere appeltaart.
Wil je alsjeblieft het raam openmaken?
De baby slaapt boven in de blauwe kamer.
Morgen gaan we met de bus naar zee.
Waar heb je mijn nieuwe boek gelaten?
Vijf vissen zwemmen voorbij de brug.
Bedankt dat jullie allemaal gekomen zijn.
Papa maakt soep met peper en boter.
Het was een vreemde maar mooie film.
Mijn broer is zijn fiets weer vergeten.
Het weer wordt vanmiddag veel beter.
""",
    "pl": """
Dzień dobry, jak się pan dzisiaj czuje?
Moja mama piecze pyszne ciasto z jabłkami.
Proszę, otwórz trochę okno.
Mały brat śpi w niebieskim pokoju.
Jutro pojedziemy autobusem nad morze.
Gdzie położyłeś moją nową książkę?
Bardzo dziękuję, że wszyscy przyszliście.
W parku pada deszcz, ale nam to nie przeszkadza.
Pięć ptaków fruwa nad wodą.
To był bardzo zabawny film.
Kupiliśmy chleb, masło i świeże owoce.
Babcia opowiada wnukom bajkę.
""",
    "ru": """
Доброе утро, как у вас дела?
Моя мама печёт вкусный яблочный пирог.
Пожалуйста, открой немного окно.
Малыш спит в своей комнате.
Завтра мы поедем на автобусе к морю.
Где ты оставил мою новую книгу?
Большое спасибо, что вы пришли.
Папа любит суп с перцем и хлебом.
Мой брат опять забыл свой телефон.
Это был очень смешной фильм.
Погода хорошая, пойдём гулять в парк.
Бабушка купила пять больших яблок.
""",
    "tr": """
Günaydın, bugün nasılsınız?
Annem çok güzel bir elmalı pasta yaptı.
Lütfen pencereyi biraz açar mısın?
Bebek mavi odada uyuyor.
Yarın otobüsle denize gideceğiz.
Benim yeni kitabımı nereye koydun?
Geldiğiniz için çok teşekkür ederim.
Babam biberli çorbayı çok sever.
Kardeşim telefonunu yine evde unuttu.
Bu film gerçekten çok komikti.
Hava bugün çok güzel, parka gidelim.
Pazardan peynir, ekmek ve meyve aldık.
""",
    "sv": """
God morgon, hur mår du i dag?
Min mamma bakar en god äppelpaj.
Kan du vara snäll och öppna fönstret?
Barnet sover i det blå rummet.
I morgon åker vi buss till havet.
Var har du lagt min nya bok?
Tack så mycket för att ni kom.
Pappa lagar soppa med peppar och smör.
Min bror har glömt sin mobil igen.
Det var en väldigt rolig film.
Fem fåglar flyger över bron.
Vädret blir bättre framåt kvällen.
""",
    "cmn": """
ni3 hao3, ni3 jin1 tian1 zen3 me yang4?
wo3 ma1 ma zuo4 de fan4 hen3 hao3 chi1.
qing3 ni3 ba3 chuang1 hu da3 kai1.
bao3 bao zai4 fang2 jian1 li3 shui4 jiao4.
ming2 tian1 wo3 men zuo4 che1 qu4 hai3 bian1.
wo3 de xin1 shu1 fang4 zai4 na3 li3?
fei1 chang2 xie4 xie nin2.
ba4 ba xi3 huan1 mian4 bao1 he2 niu2 nai3.
wo3 peng2 you3 mai3 le wu3 ge4 ping2 guo3.
jin1 tian1 tian1 qi4 hen3 hao3, wo3 men qu4 gong1 yuan2 ba.
zhe4 bu4 dian4 ying3 fei1 chang2 you3 yi4 si.
""",
    "ja": """
おはようございます、おげんきですか。
ははは おいしい りんごの パイを つくります。
まどを すこし あけてください。
あかちゃんは へやで ねています。
あした みんなで うみへ いきます。
わたしの あたらしい ほんは どこですか。
ほんとうに ありがとうございました。
ちちは パンと バターが すきです。
ともだちが ぼうしを かいました。
きょうは てんきが いいから、さんぽを しましょう。
とても おもしろい えいがでしたね。
""",
    "hi": """
नमस्ते, आप आज कैसे हैं?
मेरी माँ बहुत अच्छा खाना बनाती हैं।
कृपया खिड़की थोड़ी खोल दीजिए।
बच्चा अपने कमरे में सो रहा है।
कल हम बस से बाज़ार जाएँगे।
मेरी नई किताब कहाँ रखी है?
आने के लिए आपका बहुत धन्यवाद।
पिताजी को फल और मिठाई पसंद है।
मेरा भाई फिर अपना फ़ोन भूल गया।
आज मौसम बहुत अच्छा है, बाहर चलते हैं।
यह फ़िल्म सचमुच मज़ेदार थी।
""",
    "fi": """
Hyvää huomenta, mitä sinulle kuuluu?
Äiti leipoo hyvää omenapiirakkaa.
Voisitko avata ikkunan, ole hyvä?
Vauva nukkuu pienessä huoneessa.
Huomenna menemme bussilla meren rannalle.
Mihin panit minun uuden kirjani?
Kiitos paljon, että tulitte.
Isä pitää pippurista ja voista.
Veljeni unohti taas puhelimensa kotiin.
Se oli todella hauska elokuva.
Tänään sää on kaunis, mennään puistoon.
""",
    "cs": """
Dobré ráno, jak se dnes máte?
Moje maminka peče dobrý jablečný koláč.
Prosím, otevři trochu okno.
Malý bratr spí v modrém pokoji.
Zítra pojedeme autobusem k řece.
Kam jsi dal moji novou knihu?
Moc děkuji, že jste všichni přišli.
Babička koupila pět velkých jablek.
Můj bratr zase zapomněl telefon.
To byl opravdu veselý film.
Dnes je hezky, půjdeme do parku.
""",
}
_TEMPLATES = {
    "en": """
The number is {n}.
The train leaves at {h} {m} from platform {d}.
My name is {name}, and I was born in {y}.
It costs {n} [pounds/dollars/euros], maybe a bit more.
{name} and {name} have [bought/found/painted/moved/borrowed] [a boat/the map/my bike/five apples/the piano].
[Please/Maybe/Often] [bring/move/open/show/fix] the [big/small/blue/broken/funny] [box/lamp/book/window/phone].
We will meet on [Monday/Wednesday/Friday/Sunday], [May/March/July/August] {d}.
[My/Your/Her] [mother/brother/friend/wife] [always/never/often] [buys/paints/forgets] [fresh bread/warm milk/blue flowers].
Did {name} really [walk/swim/fly/move] [from Paris/to the village/above the bridge/before breakfast]?
[Above/Behind/Before] the [farm/bridge/office/village] there [is/was] a [famous/beautiful/very old] [pub/path/forest].
""",
    "de": """
Die Nummer ist {n}.
Der Zug fährt um {h} Uhr {m} von Gleis {d}.
Mein Name ist {name}, ich bin {d} Jahre alt.
Das kostet {n} Euro, vielleicht etwas mehr.
{name} und {name} haben [ein Boot/fünf Äpfel/den Brief/die Lampe] [gekauft/gefunden/bezahlt/vergessen].
[Mein/Dein/Sein] [Bruder/Freund/Vater] [fährt/fliegt/läuft] [oft/bald/immer] [nach Berlin/zum Bahnhof/über die Brücke].
Bitte [bring/hol/gib] mir [das blaue Buch/die warme Milch/den Pfeffer/meine Mütze].
""",
    "fr": """
Le numéro est {n}.
Il est {h} heures {m}, [bonsoir/bonjour] {name}.
{name} et {name} ont [acheté/trouvé/oublié] [un bateau/la lampe/une pomme verte].
""",
    "es": """
El número es {n}.
Son las {h} y {m}, [buenos días/buenas noches], {name}.
{name} y {name} [compran/buscan/olvidan] [un barco/la lámpara/el pan fresco].
""",
    "it": """
Il numero è {n}.
Sono le {h} e {m}, [buongiorno/buonasera] {name}.
{name} e {name} [comprano/trovano/vedono] [una barca/la lampada/il pane fresco].
""",
    "pt": """
O número é {n}.
{name} e {name} [compram/procuram/vendem] [um barco/a lâmpada/o pão fresco].
""",
    "nl": """
Het nummer is {n}.
{name} en {name} [kopen/vinden/verven] [een boot/de lamp/vijf appels].
""",
    "pl": """
Numer to {n}.
Mam na imię {name} i mam {d} lat.
""",
    "ru": """
Номер {n}.
Меня зовут {name}, мне {d} лет.
""",
    "tr": """
Numara {n}.
Benim adım {name}, {d} yaşındayım.
""",
    "sv": """
Numret är {n}.
Jag heter {name} och är {d} år.
""",
    "cmn": """
wo3 [mai3/mai4/kan4/yao4] [ping2 guo3/mian4 bao1/hua1/bei1 zi].
[ba4 ba/ma1 ma/peng2 you3] [ming2 tian1/jin1 tian1] [hui2 jia1/qu4 fan4 dian4/mai3 bao4 zhi3].
""",
    "ja": """
[わたし/ぼく/あなた]は [パン/ほん/うま/ふね]が [すきです/ほしいです].
でんわばんごうは {n} です。
""",
    "hi": """
मेरा नंबर {n} है।
""",
    "fi": """
Numero on {n}.
Nimeni on {name} ja olen {d} vuotta vanha.
""",
    "cs": """
Číslo je {n}.
Jmenuji se {name} a je mi {d} let.
""",
}
_NAMES = ("Anna", "Peter", "Maria", "Paul", "Emma", "Robert", "Sofia", "Victor", "Bianca", "Thomas", "Eva", "Omar")


def is_held_out(sentence: str) -> bool:
    """Whether only held-out clips may say the sentence."""
    return zlib.crc32(sentence.encode()) % HELD_OUT_SHARE == 0


def languages() -> tuple[str, ...]:
    """The languages there are sentences for, as espeak-ng names their family: "en", "de", ..."""
    return tuple(_SENTENCES)


def written(language: str, held_out: bool) -> list[str]:
    """The sentences of one side that stand in this file. Raises KeyError for a language without sentences."""
    return [line for line in _lines(_SENTENCES[language]) if is_held_out(line) == held_out]


def sentence(rng: np.random.Generator, language: str, held_out: bool) -> str:
    """A random sentence of one side: two of three are written, one is a filled template."""
    if rng.random() < 0.67:
        choices = written(language, held_out)
        return choices[rng.integers(len(choices))]
    templates = _lines(_TEMPLATES[language])
    while True:
        filled = _filled(rng, templates[rng.integers(len(templates))])
        if is_held_out(filled) == held_out:
            return filled


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def _filled(rng: np.random.Generator, template: str) -> str:
    """{n} number, {h} hour, {m} minute, {d} 2..28, {y} year, {name}; a/b/c in brackets is one of them."""
    facts = {
        "n": int(10 ** rng.uniform(1, 4.5)),
        "h": int(rng.integers(1, 13)),
        "m": int(rng.integers(10, 60)),
        "d": int(rng.integers(2, 29)),
        "y": int(rng.integers(1950, 2040)),
        "name": _NAMES[rng.integers(len(_NAMES))],
    }
    chosen = re.sub(r"\[([^]]*)\]", lambda match: str(rng.choice(match[1].split("/"))), template)
    return chosen.format(**facts)
