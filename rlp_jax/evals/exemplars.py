# SPDX-License-Identifier: Apache-2.0
"""Worked examples that stand before a question: our own, in the manner of the published few-shot prompts.

WORD_PROBLEMS as in chain-of-thought prompting (Wei et al., arXiv 2201.11903), MATHEMATICS as in Minerva's (Lewkowycz et
al., arXiv 2206.14858), CHOICES as in MMLU-Pro's (Wang et al., arXiv 2406.01574).
"""

from typing import NamedTuple


class Exemplar(NamedTuple):
    """A question, how it is solved, and the answer: a text, or the letter of one of the choices."""

    question: str
    solution: str
    answer: str
    choices: tuple[str, ...] = ()


WORD_PROBLEMS = (
    Exemplar(
        "A shelf holds 14 jars. Mira puts 9 more jars on it and then takes 4 away. How many jars are on the shelf?",
        "The shelf held 14 jars. After Mira put 9 more on it there were 14 + 9 = 23. She took 4 away, so 23 - 4 = 19 "
        "are left.",
        "19",
    ),
    Exemplar(
        "A bus ticket costs $3. How much do 4 adults pay for a trip there and back?",
        "There and back are 2 tickets for each adult, so 4 adults need 4 * 2 = 8 tickets. They pay 8 * 3 = 24 dollars.",
        "24",
    ),
    Exemplar(
        "Jonas read 12 pages on Monday, twice as many on Tuesday, and the remaining 30 pages of his book on Wednesday. "
        "How many pages does the book have?",
        "On Tuesday Jonas read 12 * 2 = 24 pages. Together with Monday that is 12 + 24 = 36. With the 30 pages of "
        "Wednesday the book has 36 + 30 = 66 pages.",
        "66",
    ),
    Exemplar(
        "A gardener has 45 seedlings. A third of them dies, and the others are planted in rows of 6. How many rows are "
        "there?",
        "A third of 45 is 45 / 3 = 15. So 45 - 15 = 30 seedlings live. In rows of 6 they make 30 / 6 = 5 rows.",
        "5",
    ),
    Exemplar(
        "Lena earns $15 an hour. She works 6 hours a day on 5 days and spends $120 of what she earns. How many dollars "
        "are left?",
        "Lena works 6 * 5 = 30 hours. She earns 30 * 15 = 450 dollars. After spending 120 she has 450 - 120 = 330 "
        "dollars.",
        "330",
    ),
    Exemplar(
        "A tank holds 200 liters and is 40% full. How many liters are missing?",
        "The tank holds 200 * 40 / 100 = 80 liters now. So 200 - 80 = 120 liters are missing.",
        "120",
    ),
    Exemplar(
        "Tom is 8 years younger than his sister, who is 3 times as old as their brother. The brother is 7. How old is "
        "Tom?",
        "The sister is 3 * 7 = 21 years old. Tom is 8 years younger, so he is 21 - 8 = 13.",
        "13",
    ),
    Exemplar(
        "A printer makes 20 pages a minute. It prints 5 copies of a text of 48 pages. How many minutes does that take?",
        "5 copies of 48 pages are 5 * 48 = 240 pages. At 20 pages a minute that takes 240 / 20 = 12 minutes.",
        "12",
    ),
)

MATHEMATICS = (
    Exemplar(
        r"Solve $|2x - 8| < 2$ for real $x$. Write the solution as an interval.",
        r"The inequality says $-2 < 2x - 8 < 2$. Adding $8$ gives $6 < 2x < 10$, so $3 < x < 5$.",
        r"(3,5)",
    ),
    Exemplar(
        r"A fair die is rolled twice. What is the probability that the sum of the two numbers is $4$?",
        r"There are $6 \cdot 6 = 36$ equally likely outcomes. The sum is $4$ for $(1,3)$, $(2,2)$ and $(3,1)$, that is "
        r"for $3$ of them. The probability is $\frac{3}{36} = \frac{1}{12}$.",
        r"\frac{1}{12}",
    ),
    Exemplar(
        r"Let $f(x) = 2x^2 - 3x$. Find $f(f(2))$.",
        r"First, $f(2) = 2 \cdot 4 - 3 \cdot 2 = 2$. So $f(f(2)) = f(2) = 2$.",
        r"2",
    ),
    Exemplar(
        r"The legs of a right triangle have lengths $4$ and $6$. How long is the altitude to the hypotenuse?",
        r"The hypotenuse is $\sqrt{16 + 36} = 2\sqrt{13}$ and the area is $\frac{1}{2} \cdot 4 \cdot 6 = 12$. For the "
        r"altitude $h$, $\frac{1}{2} \cdot 2\sqrt{13} \cdot h = 12$, so $h = \frac{12}{\sqrt{13}} = "
        r"\frac{12\sqrt{13}}{13}$.",
        r"\frac{12\sqrt{13}}{13}",
    ),
)

CHOICES = (
    Exemplar(
        "Which of these quantities is conserved in every collision of an isolated system?",
        "In an isolated system no outside force acts, so the total momentum cannot change. Kinetic energy may turn to "
        "heat, and the speed of each body may change.",
        "B",
        ("Kinetic energy", "Momentum", "The speed of the heavier body", "Temperature"),
    ),
    Exemplar(
        "Where in a eukaryotic cell does most of the ATP of aerobic respiration come from?",
        "The electron transport chain and ATP synthase stand in the inner membrane of the mitochondria, and they make "
        "most of the ATP.",
        "D",
        ("The nucleus", "The Golgi apparatus", "Ribosomes", "Mitochondria"),
    ),
    Exemplar(
        "What is the pH of a 0.001 M solution of hydrochloric acid?",
        "Hydrochloric acid is strong and dissociates completely, so the concentration of hydrogen ions is 0.001 M = "
        "10^-3 M. The pH is -log10(10^-3) = 3.",
        "A",
        ("3", "7", "11", "1"),
    ),
    Exemplar(
        "A sorted array has 1,000 entries. At most how many entries does a binary search look at?",
        "Every look halves the range that is left. Since 2^9 = 512 < 1000 < 1024 = 2^10, ten looks are always enough, "
        "and nine are not.",
        "C",
        ("1,000", "500", "10", "3"),
    ),
    Exemplar(
        "The price of a good rises from 10 to 11 and the quantity sold falls from 100 to 80. Then demand is",
        "The price rises by 10 percent and the quantity falls by 20 percent. In percent the quantity changes by more "
        "than the price, so demand is elastic.",
        "A",
        ("Elastic", "Inelastic", "Of unit elasticity", "Perfectly inelastic"),
    ),
)
