"""Map folder names and label numbers to a model's classes.

`IMAGENET_A` and `IMAGENET_R` list the 200 ImageNet classes that these test sets contain. The
numbers are those of pytorch-image-models (Apache-2.0),
`timm/data/_info/imagenet_{a,r}_{indices,synsets}.txt`, which equal the lists of
github.com/hendrycks/natural-adv-examples and github.com/hendrycks/imagenet-r.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from runtime.errors import DataError, SpecError, nearest
from runtime.spec import ModelSpec

__all__ = [
    "CIFAR10",
    "IMAGENET_A",
    "IMAGENET_R",
    "among",
    "by_cifar_number",
    "by_folder",
    "by_imagenet_number",
    "has_imagenet_classes",
]

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's classes, in the order of its labels. Source: cs.toronto.edu/~kriz/cifar.html."""

_IMAGENET_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""SHA-256 of ImageNet's 1,000 WordNet ids, sorted and joined by newlines."""

_WNID = re.compile(r"n\d{8}")


def by_folder(names: Iterable[str], spec: ModelSpec, where: str) -> dict[str, int]:
    """Find the classes of folders that are named by WordNet ids or class names.

    Args:
        names: names of the folders.
        spec: spec of the model, with its classes.
        where: the folder that contains them, for messages.

    Returns:
        Folder → class, for the folders that match a class of the model.

    Raises:
        DataError: no folder matches a class, or a folder's name matches several classes.
    """
    names = sorted(names)
    wnids = {wnid: place for place, wnid in enumerate(spec.wnids)}
    classes = {name: place for place, name in enumerate(spec.classes)}
    found = {name: wnids.get(name, classes.get(name, -1)) for name in names}
    known = {name: place for name, place in found.items() if place >= 0}
    if not known:
        raise DataError(_no_match_message(names, spec, where))
    ambiguous = {name for name, number in Counter(spec.classes).items() if number > 1}
    unclear = sorted(name for name in known if name in ambiguous and name not in wnids)
    if unclear:
        raise DataError(
            f"{where}: the model has several classes named {unclear[0]!r}; name the folders by WordNet ids instead"
        )
    return known


def _no_match_message(names: list[str], spec: ModelSpec, where: str) -> str:
    if not names:
        return f"{where}: expected CLASS/IMAGE files; found no folders"
    inner = next((name for name in ("val", "test", "validation") if name in names), None)
    if inner:
        return f"{where}: expected CLASS/IMAGE files; found {', '.join(names[:4])}. Use {where}/{inner}"
    if all(_WNID.fullmatch(name) for name in names) and not spec.wnids:
        return (
            f"{where}: the folders are named by WordNet ids ({names[0]}, …), which the model does not know: its "
            f"classes are {_abbreviate(spec.classes)}. Name the folders by these classes, or evaluate a model that was "
            "trained on folders named by WordNet ids"
        )
    hint = nearest(names[0], (*spec.classes, *spec.wnids), 1)
    expected = _abbreviate(spec.classes) + (f", or {_abbreviate(spec.wnids)}" if spec.wnids else "")
    found = _abbreviate(names)
    return f"{where}: expected folders named by the model's classes ({expected}); found {found}. {hint}".rstrip()


def by_imagenet_number(names: Iterable[str], spec: ModelSpec, where: str) -> dict[str, int]:
    """Find the classes of folders named 0 to 999, as in ImageNet-V2.

    Raises:
        DataError: a folder's name is not such a number, or there are no folders.
        SpecError: the model's classes are not ImageNet's 1,000 in their usual order.
    """
    names = list(names)
    wrong = [name for name in names if not (name.isascii() and name.isdecimal() and int(name) < 1000)]
    if wrong or not names:
        raise DataError(
            f"{where}: expected folders named 0 to 999, as in ImageNet-V2; found "
            f"{_abbreviate(sorted(wrong)) if wrong else 'none'}. For folders named by WordNet ids, use --suite imagenet"
        )
    if not _is_imagenet(spec):
        raise SpecError(
            "numbered folders need a model of ImageNet's 1,000 classes in the order of their WordNet ids; found "
            f"{len(spec.classes)} classes ({_abbreviate(spec.wnids or spec.classes)})"
        )
    return {name: int(name) for name in names}


def by_cifar_number(numbers: Iterable[int], spec: ModelSpec, where: str) -> dict[int, int]:
    """Find the classes of CIFAR-10's label numbers by their names.

    Raises:
        DataError: a number is not from 0 to 9.
        SpecError: the model does not have CIFAR-10's classes.
    """
    numbers = sorted(set(numbers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= len(CIFAR10):
        raise DataError(
            f"{where}: expected CIFAR-10's labels, 0 to 9; found {_abbreviate(map(str, numbers)) or 'none'}"
        )
    places = {name: place for place, name in enumerate(spec.classes)}
    if set(CIFAR10) <= set(places):
        return {number: places[CIFAR10[number]] for number in numbers}
    if list(spec.classes) in ([f"class {number}" for number in range(10)], [str(number) for number in range(10)]):
        return {number: number for number in numbers}
    missing = [name for name in CIFAR10 if name not in places]
    raise SpecError(
        f"CIFAR-10's labels need a model with its classes ({_abbreviate(CIFAR10)}); found "
        f"{_abbreviate(spec.classes)}, without {_abbreviate(missing)}"
    )


def among(
    names: Iterable[str], chosen: Mapping[str, int], spec: ModelSpec, where: str
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Find the 200 classes of ImageNet-A or -R in the model, and the class of each folder.

    Args:
        names: names of the folders; folders of other classes are ignored.
        chosen: the 200 classes: WordNet id → position among ImageNet's 1,000 classes.
        spec: spec of the model, with its classes.
        where: the folder that contains them, for messages.

    Returns:
        Folder → class, and all 200 classes in the model's order.

    Raises:
        DataError: no folder is named by one of the WordNet ids.
        SpecError: the model lacks one of the 200 classes.
    """
    places = {wnid: place for place, wnid in enumerate(spec.wnids)}
    if not places and _is_imagenet(spec):
        places = dict(chosen)
    missing = [wnid for wnid in chosen if wnid not in places]
    if missing:
        raise SpecError(
            f"this set needs 200 of ImageNet's classes; the model has {len(spec.classes)} classes and lacks "
            f"{len(missing)} of the 200 ({_abbreviate(missing)}). Evaluate a model of ImageNet's 1,000 classes"
        )
    names = sorted(names)
    known = {name: places[name] for name in names if name in chosen}
    if not known:
        raise DataError(
            f"{where}: expected folders named by the WordNet ids of the 200 classes ({_abbreviate(chosen)}); found "
            f"{_abbreviate(names) or 'no folders'}"
        )
    return known, tuple(sorted(places[wnid] for wnid in chosen))


def has_imagenet_classes(spec: ModelSpec) -> bool:
    """Return whether the WordNet ids of the classes are ImageNet's 1,000, in any order."""
    joined = "\n".join(sorted(spec.wnids))
    return len(spec.classes) == 1000 and hashlib.sha256(joined.encode()).hexdigest() == _IMAGENET_SHA256


def _is_imagenet(spec: ModelSpec) -> bool:
    """Return whether the classes are ImageNet's in the order of their WordNet ids."""
    return len(spec.classes) == 1000 and (not spec.wnids or list(spec.wnids) == sorted(spec.wnids))


def _abbreviate(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed)})" if len(listed) > limit else "")


def _parse_table(text: str) -> dict[str, int]:
    pairs = (entry.split(":") for entry in text.split())
    return {wnid: int(place) for place, wnid in pairs}


IMAGENET_A = _parse_table("""
6:n01498041 11:n01531178 13:n01534433 15:n01558993 17:n01580077 22:n01614925 23:n01616318 27:n01631663 30:n01641577
37:n01669191 39:n01677366 42:n01687978 47:n01694178 50:n01698640 57:n01735189 70:n01770081 71:n01770393 76:n01774750
79:n01784675 89:n01819313 90:n01820546 94:n01833805 96:n01843383 97:n01847000 99:n01855672 105:n01882714 107:n01910747
108:n01914609 110:n01924916 113:n01944390 124:n01985128 125:n01986214 130:n02007558 132:n02009912 143:n02037110
144:n02051845 150:n02077923 151:n02085620 207:n02099601 234:n02106550 235:n02106662 254:n02110958 277:n02119022
283:n02123394 287:n02127052 291:n02129165 295:n02133161 298:n02137549 301:n02165456 306:n02174001 307:n02177972
308:n02190166 309:n02206856 310:n02219486 311:n02226429 313:n02231487 314:n02233338 315:n02236044 317:n02259212
319:n02268443 323:n02279972 324:n02280649 326:n02281787 327:n02317335 330:n02325366 334:n02346627 335:n02356798
336:n02361337 347:n02410509 361:n02445715 363:n02454379 372:n02486410 378:n02492035 386:n02504458 397:n02655020
400:n02669723 401:n02672831 402:n02676566 404:n02690373 407:n02701002 411:n02730930 416:n02777292 417:n02782093
420:n02787622 425:n02793495 428:n02797295 430:n02802426 437:n02814860 438:n02815834 445:n02837789 456:n02879718
457:n02883205 461:n02895154 462:n02906734 470:n02948072 472:n02951358 483:n02980441 486:n02992211 488:n02999410
492:n03014705 496:n03026506 514:n03124043 516:n03125729 528:n03187595 530:n03196217 539:n03223299 542:n03250847
543:n03255030 549:n03291819 552:n03325584 557:n03355925 561:n03384352 562:n03388043 569:n03417042 572:n03443371
573:n03444034 575:n03445924 579:n03452741 589:n03483316 606:n03584829 607:n03590841 609:n03594945 614:n03617480
626:n03666591 627:n03670208 640:n03717622 641:n03720891 642:n03721384 643:n03724870 658:n03775071 668:n03788195
677:n03804744 682:n03837869 684:n03840681 687:n03854065 701:n03888257 704:n03891332 719:n03935335 736:n03982430
746:n04019541 749:n04033901 752:n04039381 758:n04067472 763:n04086273 765:n04099969 768:n04118538 773:n04131690
774:n04133789 776:n04141076 779:n04146614 780:n04147183 786:n04179913 792:n04208210 797:n04235860 802:n04252077
803:n04252225 804:n04254120 813:n04270147 815:n04275548 820:n04310018 823:n04317175 831:n04344873 833:n04347754
835:n04355338 839:n04366367 845:n04376876 847:n04389033 850:n04399382 859:n04442312 862:n04456115 870:n04482393
879:n04507155 880:n04509417 888:n04532670 890:n04540053 897:n04554684 900:n04562935 907:n04591713 913:n04606251
924:n07583066 932:n07695742 933:n07697313 934:n07697537 937:n07714990 943:n07718472 945:n07720875 947:n07734744
951:n07749582 954:n07753592 956:n07760859 957:n07768694 959:n07831146 971:n09229709 972:n09246464 980:n09472597
981:n09835506 984:n11879895 986:n12057211 987:n12144580 988:n12267677
""")
"""ImageNet-A: WordNet id → position among the 1,000 classes."""

IMAGENET_R = _parse_table("""
1:n01443537 2:n01484850 4:n01494475 6:n01498041 8:n01514859 9:n01518878 11:n01531178 13:n01534433 22:n01614925
23:n01616318 26:n01630670 29:n01632777 31:n01644373 39:n01677366 47:n01694178 63:n01748264 71:n01770393 76:n01774750
79:n01784675 84:n01806143 90:n01820546 94:n01833805 96:n01843383 97:n01847000 99:n01855672 100:n01860187 105:n01882714
107:n01910747 113:n01944390 122:n01983481 125:n01986214 130:n02007558 132:n02009912 144:n02051845 145:n02056570
147:n02066245 148:n02071294 150:n02077923 151:n02085620 155:n02086240 160:n02088094 161:n02088238 162:n02088364
163:n02088466 171:n02091032 172:n02091134 178:n02092339 187:n02094433 195:n02096585 199:n02097298 203:n02098286
207:n02099601 208:n02099712 219:n02102318 231:n02106030 232:n02106166 234:n02106550 235:n02106662 242:n02108089
245:n02108915 247:n02109525 250:n02110185 251:n02110341 254:n02110958 259:n02112018 260:n02112137 263:n02113023
265:n02113624 267:n02113799 269:n02114367 276:n02117135 277:n02119022 281:n02123045 288:n02128385 289:n02128757
291:n02129165 292:n02129604 293:n02130308 296:n02134084 299:n02138441 301:n02165456 308:n02190166 309:n02206856
310:n02219486 311:n02226429 314:n02233338 315:n02236044 319:n02268443 323:n02279972 327:n02317335 330:n02325366
334:n02346627 335:n02356798 337:n02363005 338:n02364673 340:n02391049 341:n02395406 344:n02398521 347:n02410509
353:n02423022 355:n02437616 361:n02445715 362:n02447366 365:n02480495 366:n02480855 367:n02481823 368:n02483362
372:n02486410 388:n02510455 390:n02526121 393:n02607072 397:n02655020 401:n02672831 407:n02701002 413:n02749479
414:n02769748 425:n02793495 428:n02797295 430:n02802426 435:n02808440 437:n02814860 441:n02823750 447:n02841315
448:n02843684 457:n02883205 462:n02906734 463:n02909870 469:n02939185 470:n02948072 471:n02950826 472:n02951358
476:n02966193 483:n02980441 487:n02992529 515:n03124170 546:n03272010 555:n03345487 558:n03372029 570:n03424325
579:n03452741 583:n03467068 587:n03481172 593:n03494278 594:n03495258 596:n03498962 609:n03594945 613:n03602883
617:n03630383 621:n03649909 629:n03676483 637:n03710193 657:n03773504 658:n03775071 701:n03888257 717:n03930630
724:n03947888 763:n04086273 768:n04118538 774:n04133789 776:n04141076 779:n04146614 780:n04147183 787:n04192698
805:n04254680 812:n04266014 815:n04275548 820:n04310018 824:n04325704 833:n04347754 847:n04389033 852:n04409515
866:n04465501 875:n04487394 883:n04522168 889:n04536866 895:n04552348 907:n04591713 928:n07614500 931:n07693725
932:n07695742 933:n07697313 934:n07697537 936:n07714571 937:n07714990 943:n07718472 945:n07720875 947:n07734744
948:n07742313 949:n07745940 951:n07749582 953:n07753275 954:n07753592 957:n07768694 963:n07873807 965:n07880968
967:n07920052 980:n09472597 981:n09835506 983:n10565667 988:n12267677
""")
"""ImageNet-R: WordNet id → position among the 1,000 classes."""
