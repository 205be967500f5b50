"""Which answers count as right: tables of texts, each with the answer that it gives or does not give."""

import random
import time

import pytest

from pairs import grading
from pairs.grading import is_correct, paired_gain
from pairs.problems import STEP_PREFIX


def box(text: str) -> str:
    return rf"Step 1: so it is \boxed{{{text}}}."


NINES = "9" * 5000
RIGHT = [  # (solution, answer) that count as right
    (r"a \boxed{\frac{1}{2}} b", "1/2"), (r"\boxed{\sqrt{\frac{2}{3}}}", r"\sqrt{\frac23}"),
    (r"\fbox{7}", "7"),
    (r"first \boxed{3}, then \boxed{4}", "4"), (r"so \boxed 9.", "9"), (box(r"\{1,2\}"), r"\{2,1\}"),
    ("The answer is: 72", "72"), ("the ANSWER IS $72$.", "72"), ("#### 72", "72"),
    ("The answer is: **42**", "42"),
    ("The answer is: 7\nNo, the answer is: 8", "8"), ("The answer is 3.5. I hope this helps", "3.5"),
    ("The answer is: \u22123", "-3"), (box("$72$"), "72"), (box(r"\(72\)"), "72"),
    ("The answer is: 5", "work\n#### 5"),
    (box("0.5"), "1/2"), (box("1/2"), "2/4"), (box(r"\dfrac{6}{8}"), r"\frac34"),
    (box(r"-\frac{1}{2}"), "-0.5"),
    (box("3.50"), "3.5"), (box("72.0"), "72"), (box(".5"), "0.5"), (box("007"), "7"), (box("+5"), "5"),
    (box("1,234"), "1234"), (box("1,234,567.5"), "1234567.5"), (box(r"1{,}234"), "1234"),
    (box(r"12\,345"), "12345"),
    ("The answer is: $1,500.00", "1500"), (box(r"3 \times 10^5"), "300000"),
    (box(r"2.5 \cdot 10^{-3}"), "0.0025"),
    (box(r"1\frac{1}{2}"), "3/2"), (box("2 3/4"), "2.75"), (box(r"-1\frac12"), "-1.5"),
    (box(r"50\%"), "50"), (box("50%"), "50%"), (box("50 percent"), r"50\%"), (box("12.5%"), "25/2"),
    (box(r"5\text{ cm}"), "5"), (box("5 cm"), "5 cm"), (box(r"10\text{ cm}^2"), "10"), (box(r"\$18"), "18"),
    (box("$5"), "5 dollars"), ("The answer is: 72 clips", "72"), ("The answer is: 60 miles per hour", "60"),
    (box(r"90^\circ"), "90"), (box("90 degrees"), r"90^{\circ}"), (box("7 apples"), "7 apple"),
    (box(r"\left[0, 1\right)"), "[0,1)"), (box("(1, 2)"), "(1,2)"), (box("(1/2, 3)"), "(0.5,3)"),
    (box("5"), "(5)"),
    (box("1, 2"), "2,1"), (box("1 and 2"), "2, 1"), (box("3 or -3"), "-3, 3"),
    (box(r"\{1,2,3\}"), r"\{3,2,1\}"),
    (box(r"(-\infty, 0) \cup (1, \infty)"), r"(1,\infty)\cup(-\infty,0)"),
    (box(r"\text{Yes}"), "yes"), (box("Monday"), "monday"), ("The answer is: Tom", "Tom"),
    (box("x = 5"), "5"), (box("y = 2x + 1"), "2x+1"), (box("f(x) = 3x"), "3x"), (box("9^{9^9}"), "9^{9^9}"),
    (box("B"), "B"), (box("(B)"), "B"), (box(r"\text{(B)}"), "B"), (box("B) 12 km"), "B"), (box("b"), "B"),
    ("The answer is: B. 12", "B"), ("The answer is: option C", "C"), ("The answer is (D).", "D"),
    # Another mark: "Answer:", a heading, "18 is the answer".
    ("Answer: 18", "18"), ("answer:18", "18"), ("**Answer:** 18", "18"), ("**Answer**: 18", "18"),
    ("**Answer: 18**", "18"), ("## Answer: 18", "18"), ("> Answer: 18", "18"), ("_Answer:_ 18", "18"),
    ("<b>Answer:</b> 18", "18"), (r"\textbf{Answer:} 18", "18"), ("Final Answer: 18", "18"),
    ("Ans: 18", "18"), ("Answer = 18", "18"), ("So the final answer: 18.", "18"),
    ("Answer (rounded): 8.24", "8.24"), ("### Final Answer\n18", "18"), ("**Final Answer**\n\n$18$", "18"),
    ("$18$ is the answer.", "18"), ("So 18 is the final answer.", "18"), ("18 dollars is the answer.", "18"),
    ("The answers are 3 and 4.", "4, 3"), ("The answer must be 18.", "18"),
    ("The answer would be $18.", "18"), ("The answer turns out to be 18.", "18"),
    ("The answer to the question is 18.", "18"), ("The answer, in dollars, is 18.", "18"),
    ("The answer (in dollars) is 18", "18"), ("The answer in simplest form is 1/2.", "0.5"),
    ("The answer you're looking for is 18.", "18"), ("Answer : OPTION C", "C"), ("ANSWER:D.", "D"),
    ("Answer: (B) 12", "B"), ("Answer D", "D"), ("The correct option is C.", "C"), ("B is the answer", "B"),
    ("Therefore, (B) is the correct answer.", "B"),
    # An empty rest of the line goes on in the next.
    ("The final answer is:\n$$18$$", "18"), ("The answer is:\n\\[\n18\n\\]", "18"),
    ("The answer is\n\n18 eggs.", "18"), ("The answer is:\n$$\n18\n$$\nHope it helps.", "18"),
    ("Answer:\n\n**18**", "18"), ("Answer:\n- 18", "18"), ("The answer is:\n-18", "-18"),
    ("The answer is as follows:\n18", "18"),
    ("The answer is:\n$$\n\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\n$$",
     r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # What is said about an answer says none.
    ("#### 18\nI hope the answer is helpful.", "18"), ("Answer: Tom\nI hope the answer is helpful.", "Tom"),
    ("The answer is: 18\nLet me know if this answer is correct.", "18"),
    ("#### 18\nThis answer is correct!", "18"),
    ("The answer is 18.\nI'm confident that my answer is right.", "18"),
    ("The answer is 18. This answer is reasonable because 18 < 20.", "18"),
    ("#### 18\nThe answer is a whole number, as expected.", "18"),
    ("#### 18\nI hope my answer is okay.", "18"),
    ("The answer is 18.\nNote that the answer is in dollars.", "18"),
    ("18 eggs. #### 18\n#### Explanation", "18"),
    ("Answer: 18\nThe answer is rounded to 2 decimal places.", "18"),
    ("The answer is 18.\nIf the answer is 12, we get a contradiction.", "18"),
    ("#### 18\nPlease tell me whether the answer is what you wanted.", "18"),
    ("#### 18\nThis answer is consistent with step 2.", "18"),
    ("#### 18\nNow we know what the answer is.", "18"),
    ("#### 18\nMy answer is based on 3 assumptions.", "18"),
    # The sentence around an answer.
    ("The answer is therefore 18.", "18"), ("The answer is, therefore, 18.", "18"),
    ("The answer is thus $18$.", "18"), ("The answer is equal to 18", "18"),
    ("The answer is indeed 18!", "18"), ("The answer: therefore 18", "18"),
    ("Hence, the answer is clear: 18", "18"), ("The answer is as follows: 18", "18"),
    ("answer is (approximately) 8.24", "8.24"), ("The answer is approximately 8.24", "8.24"),
    ("The answer is approx. 8.24", "8.24"), ("The answer is about $8.24", "8.24"),
    ("So the answer is not 12 but 18", "18"), ("The answer is not 12, it is 18.", "18"),
    ("The answer is **not 12** but **18**", "18"), ("The answer is neither 12 nor 15 but 18.", "18"),
    ("The answer is 18, not 12.", "18"), ("The answer is 18 and not 12", "18"),
    ("The answer is 18, I think.", "18"), ("The answer is 18 I hope it is correct", "18"),
    ("The answer is: 90 Indeed.", "90"), ("The answer is 18, because 9 * 2 = 18.", "18"),
    ("The answer is 18 since he eats 3.", "18"), ("The answer is 18, so Tom wins.", "18"),
    ("The answer is 18 (9 eggs times $2).", "18"), ("The answer is B because A is too small.", "B"),
    ("The answer is that she has 18 apples.", "18"), ("Answer: The total is 18.", "18"),
    ("Answer: Janet makes $18 every day.", "18"), ("### Answer:\nShe sold 72 clips.", "72"),
    ("The answer is the point (3, 4).", "(3,4)"), ("The answer is Rs. 500.", "500"),
    ("The answer is 10 a.m.", "10 am"),
    # A chain of "=" has its last member's value, and "!" may be a factorial.
    ("The answer is: 256+37 = 293", "293"), ("The answer is 5! = 120", "120"),
    ("The answer is 3! + 2! = 8.", "8"), ("Answer: 12 + 6 = 18 eggs", "18"),
    ("The answer is 9*2=<<9*2=18>>18", "18"), ("Answer: $12 + $6 = $18", "18"),
    # One letter is a choice.
    (box("B (12 km)"), "B"), (box("B is correct"), "B"), (box("the letter B"), "B"), (box("B - 12 km"), "B"),
    (box("b) 12"), "B"), (box("(Option C)"), "C"), (box("A (C is wrong)"), "A"), (box("answer C"), "C"),
]
WRONG = [
    (r"first \boxed{3}, then \boxed{4}", "3"), (r"\boxed{12", "12"), (r"it is \boxed{4}, no: \boxed{5", "4"),
    (r"\boxed{}", "0"), ("We get 72", "72"), ("The answer is", "72"), ("The answer is: ", "72"), ("", "72"),
    (STEP_PREFIX + " 3 + 4 = 7\nStep 2: so 7", "7"), (box("0.333"), "1/3"), (box("0.0005"), "0.001"),
    (box("1.0001"), "1"), (box("1/0"), "0"), (box("50"), "0.5"), (box("0.5"), "50"), (box("5000"), "50"),
    (box(r"50\%"), "0.5"), (box(r"1\frac{1}{2}"), "1/2"), (box("5 cm"), "5 m"), (box("5 cm"), "5 km"),
    (box("10 cm^2"), "10 cm"), (box("5 million"), "5"), (box("2 dozen"), "2"), (box("10 am"), "10 pm"),
    (box("2x"), "2"), (box(r"2\pi"), "2"), (box("[0,1)"), "(0,1)"), (box("(1,2)"), "(2,1)"),
    (box("(1,2)"), "[1,2]"),
    (box("(1,2)"), "1,2"), (box("(3,4)"), "3"), (box("1,2"), "1,2,3"), (box("1,1"), "1,2"),
    (box("1,234"), "234"),
    (box("east"), "seat"), (box(r"\text{odd}"), "even"), (box("x=5"), "y=5"), (box("101_2"), "101"),
    ("The answer is: A", "B"), (box("12"), "B"), ("The answer is: A train", "A"), ("The answer is: CD", "C"),
    (box(NINES), NINES + "1"), (box("-3"), "3"), (box("7:30"), "7.5"),
    # More than one letter is no choice.
    (box("A, B, C, D, E"), "A"), (box("A, C"), "A"), (box(r"A,\ C"), "A"), (box(r"\text{A, C}"), "A"),
    (box(r"A\text{, }C"), "A"), (box("{A, C}"), "A"), (box("(A), (C)"), "A"), (box("(A)(C)"), "A"),
    (box("(A) and (C)"), "A"), (box("(a) and (c)"), "A"), (box("A) and C)"), "A"), (box("A, B and C"), "A"),
    (box("A,B,C,D or E"), "A"), (box("A) 3, C) 5"), "A"), (box("option A, option C"), "A"),
    (box("A, F"), "A"), ("The answer is: A, C", "A"),
    # No other number of the sentence, no question and no supposition.
    ("The answer is 5! = 120", "5"), ("The answer is 3:2", "1.5"), ("The answer is 2 lakh", "2"),
    ("The answer is 20 more than Tom", "20"), ("The answer is 18?", "18"), ("Suppose the answer is 18", "18"),
    # Always so, and not to be lost; nothing that was cut off.
    ("The answer is: 256+37 = 293", "256"), ("The answer is not 12.", "12"), ("The answer is twice 5", "5"),
    ("So the answer is not 12 but 18", "12"), ("The answer is the square root of 16", "16"),
    ("The answer is found in line 18", "18"), ("The answer is: 7\nSo the answer is twice 5.", "7"),
    ("Answer: 3 hours and 20 minutes", "3"), ("Answer: Tom has 20 more than Jim", "20"),
    ("Express the answer as a percentage: 6/10 = 60%", "60"), ("24 answers * 2 points/answer = 48", "48"),
    ("Let us find the answer. 9 * 2 = 18", "18"), ("The answer is:\n$$18", "18"),
    ("18. The answer is:\n", "18"), ("The answer is 12. No. The answer is:\n", "12"), ("Answer:", "18"),
    ("**Answer**", "18"), ("Answer: A and C", "A"), (box("A or C"), "A"), (box("A/C"), "A"),
]


MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
SAME = [  # answers that are one value, whichever of them is the guess
    # Matrices, entry by entry.
    (MATRIX, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (MATRIX, r"\begin{bmatrix} 1 & 2 \\[1ex] 3 & 4 \\ \end{bmatrix}"),
    (MATRIX, "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}."), (MATRIX, rf"\mathbf{{A}} = {MATRIX}"),
    (MATRIX, r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)"),
    (r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ - 3 \end{pmatrix}"),
    (r"\begin{pmatrix} -4/9 & x^2 \end{pmatrix}", r"\begin{pmatrix} -\frac{4}{9} & x^{2} \end{pmatrix}"),
    # A name on one side.
    ("x=4", "x = 4"), ("x=4", "4"), (r"x \in [-2,7]", "[-2,7]"),
    (r"x \in (1,2) \cup (3,4)", r"(3,4) \cup (1,2)"), (r"\theta = 30^\circ", "30"), (r"f^{-1}(x) = 3x", "3x"),
    ("a_{10} = 3", "3"), ("AB = 5", "5"), ("(x,y) = (1,2)", "(1,2)"), (r"S = \{1,2\}", r"\{2,1\}"),
    ("x = 1, x = 2", "2, 1"), (r"\approx 8.24", "8.24"),
    # Units: run together, by their other names, after pi.
    ("5cm", "5"), ("5cm", "5 cm"), ("12km/h", "12 kilometers per hour"), ("10inches", "10"),
    ("5ft", "5 feet"), (r"5\,\text{cm}^{2}", "5 square centimeters"), (r"5 \mathrm{~cm}^2", "5 cm^2"),
    (r"40\text{ min}", "40 minutes"), ("60mph", "60 miles per hour"), (r"135\text{ square feet}", "135 ft^2"),
    (r"12\pi\text{ cm}^2", r"12\pi"), (r"30\degree", r"30^{\circ}"),
    (r"5^\circ\text{C}", "5 degrees Celsius"), (r"6\text{th}", "6th"), ("5m", "5 m"),
    (r"\approx 8.24 \text{ mph}", "8.24"), (r"33 \frac{1}{3}\%", "100/3"), (r"-\$0.50", "-1/2"),
    # Separators of thousands.
    (r"10{,}000", "10,000"), (r"10,\!000", "10000"), (r"111, \! 111, \! 111", "111111111"),
    (r"\$15,\!000", "15000"), (r"10\ 000", "10000"), (r"(1{,}000, 2)", "(1000, 2)"), (r"10{,}000.0", "10000"),
    # One way to write a value.
    (r"\cfrac{25}{16}", "25/16"), (r"1 \frac12", "3/2"), (r"\frac{\sqrt6}3", r"\frac{\sqrt{6}}{3}"),
    (r"\frac \pi4", r"\frac{\pi}{4}"), (r"\tfrac{41}2", "20.5"), (r"\sqrt[3]2", r"\sqrt[3]{2}"),
    (r"-\frac{2\sqrt{3}}{3}", r"\frac{-2 \sqrt{3}}{3}"), (r"(-\frac{a}{3}, 1)", r"(\frac{-a}{3}, 1)"),
    ("x^{2}+1", "x^2 + 1"), ("3^{2007}", "3^2007"), ("1011_2", "1011_{2}"), ("152A_{11}", "152A_11"),
    (r"\log_2 3", r"\log_{2} 3"), ("2^{10}", "1024"), ("10^5", "100000"), (r"10^{-3}", "0.001"),
    (r"x \geq 3", r"x \ge 3"), ("x <= 3", r"x \leqslant 3"), (r"x \neq 3", r"x \ne 3"),
    ("x \u2265 3", r"x \ge 3"), ("\u221a10", r"\sqrt{10}"), ("2\u03c0", r"2\pi"), ("10 cm\u00b2", "10 cm^2"),
    ("x\u00b3", "x^3"), ("(0, \u221e) \u222a [-2,-1)", r"[-2,-1) \cup (0,\infty)"), ("\\frac  1\n2", "1/2"),
    ("x \u2208 [0,1]", "[0,1]"), ("\u20135", "-5"), ("5\u00d7x", r"5\cdot x"),
    (r"(-\infty, +\infty)", r"\mathbb{R}"), (r"\varnothing", r"\emptyset"), (r"\bigl(1,2\bigr)", "(1,2)"),
    (r"1,\quad 2", "1, 2"), (r"\(1\) and \(2\)", "1, 2"), (r"1, 2, \text{ and } 3", "1,2,3"),
    (r"1 \pm \sqrt 2", r"1 + \sqrt{2}, 1 - \sqrt{2}"), (r"x = \pm 3", "3, -3"), (r"(\text{E})", r"\text{E}"),
    (r"\text{(A)}", "A"), (r"\mbox{odd}", "odd"), (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"-\frac{3}{4}", "-3/4"), (r"\frac{3}{-4}", r"-\frac34"), ("6 - 5i", "6-5i"), (r"2\pi", r"2 \pi"),
    (r"3 \text{ or } 4", "4, 3"), (r"\text{A,C,F}", "A, C, F"), ("13,800", "13800"),
    # A chain of "=" has its last member's value.
    ("256+37 = 293", "293"), ("5! = 120", "120"), ("x = 3+4 = 7", "7"), (r"3 \times 6 = 18", "18"),
    ("x == 5", "5"), (r"\frac{1}{2}+\frac{1}{4} = \frac34", "3/4"), ("3 apples + 2 apples = 5 apples", "5"),
    ("5 = x", "5"), (r"9 * \$2 = \$18", "18"), ("f(2) = 2^2+1 = 5", "5"), (r"\sqrt{16} = 4", "4"),
    (r"\sum_{i=1}^{10} i = 55", "55"), ("2 x 9 = 18", "18"), (r"\log_2 8 = 3", "3"),
    (r"50\% of 36 = 18", "18"), ("3 cm + 4 cm = 7 cm", "7"),
    # Approximately, colours, remainders, and lists that may be numbers.
    ("approximately 8.24", "8.24"), (r"\text{approximately } 8.24", "8.24"), ("(approximately) 8.24", "8.24"),
    ("about 8.24", "8.24"), ("approx. 8.24", "8.24"), ("\u2248 8.24", "8.24"), (r"\sim 8.24", "8.24"),
    (r"\sqrt{68} \approx 8.24", "8.24"), ("roughly 18 apples", "18"), (r"\therefore 18", "18"),
    (r"\color{red}{18}", "18"), (r"{\color{red}18}", "18"), (r"{\color{red}{18}}", "18"),
    (r"\color{red} 18", "18"), (r"\textcolor{blue}{18}", "18"), (r"\textcolor[rgb]{1,0,0}{18}", "18"),
    (r"\color{#FF0000}{18}", "18"), (r"\textcolor{red}{\frac{1}{2}}", "1/2"),
    (r"\color{red}{\frac{\sqrt{2}}{2}}", r"\frac{\sqrt2}{2}"), (r"\color{red}{18}\text{ cm}", "18"),
    (r"\underline{18}", "18"), (r"\boldsymbol{18}", "18"), (r"\large 18", "18"), (r"18 \pmod{20}", "18"),
    (r"18 \pmod {20}", "18 (mod 20)"), ("18 mod 20", "18"), (r"18 \bmod 20", "18"),
    (r"18\ (\text{mod}\ 20)", "18"), (r"x \equiv 18 \pmod{20}", "18"), ("x \u2261 18 (mod 20)", "18"),
    (r"1, 3 \pmod 4", "1, 3"), ("100,200,300", "100, 200, 300"), ("100,200,300", "300, 200, 100"),
    ("100,200", "100 and 200"), ("$100,200,300$", "100, 200, 300"),
    # Currencies, units with an order, what is counted, ratios and times.
    ("$5/hour", "5"), ("$5 per hour", "5 dollars per hour"), ("US$18", "18"), ("USD 18", "18"),
    ("18 USD", "$18"), ("\u20ac18", "18"), ("\u20ac18", "18 euros"), ("18\u20ac", "18"),
    ("\u00a33.50", "3.5"), ("\u00a318", "18 pounds"), ("\u20b9500", "500"), ("Rs. 500", "500"),
    ("Rs 500", "500 rupees"), ("\u00a5500", "500"), ("50\u00a2", "50 cents"), ("5 m/s", "5 m s^{-1}"),
    ("12 ft^2", "12 feet squared"), ("36 sq. km", "36 km^2"), ("50 per cent", "50%"), ("18 (apples)", "18"),
    ("18 (approximately)", "18"), ("3 third graders", "3"), ("5 a day", "5"), ("12 o'clock", "12"),
    ("10 am", "10 a.m."), ("1:30 p.m.", "1:30 pm"), ("1:2:3", "2:4:6"), (r"3\colon 2", "3:2"),
    # Number words are numbers.
    ("2 lakh", "200000"), ("3 crore", "30,000,000"), ("3 dozen", "36"), ("5 hundred", "500"),
    ("2.5 million", "2500000"), ("$2 million", "2,000,000"), ("2 hundred thousand", "200000"),
    ("2 and a half", "2.5"), ("2 and a half hours", "2.5"), (r"3\text{ pi}", r"3\pi"),
    # Always so, and not to be lost: what is counted, and where, is no part of the value.
    ("18 apples each", "18"), ("18 apples in total", "18"), ("18 red apples", "18"), ("18 people", "18"),
    ("18 students in the class", "18"), ("18 pieces of candy", "18"), ("$5 per hour", "5"),
    ("5 dollars each", "5"), ("72 clips altogether", "72"), ("12 years old", "12"),
    ("25 miles per gallon", "25"), ("1/2 pizza", "0.5"), ("$18 profit", "18"), ("18 eggs left", "18"),
    ("5 m/s", "5 meters per second"), ("60 km/h", "60 kph"), ("5 kg/m^3", "5"),
    ("9.8 m/s\u00b2", "9.8 m/s^2"), ("1:30 pm", "1:30"), ("3:2", "3 : 2"),
    ("7 days and 4 hours", "4 hours and 7 days"), ("12 quarters", "12"), ("3 gallons of water", "3"),
]
DIFFERENT = [
    (MATRIX, r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
    (MATRIX, r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (MATRIX, r"\begin{pmatrix} 1 & 2 & 3 & 4 \end{pmatrix}"),
    (MATRIX, r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"), (MATRIX, f"2{MATRIX}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 12 \end{pmatrix}"),
    (r"x \in [-2,7]", "(-2,7)"), (r"x \in [-2,7]", r"y \in [-2,7]"), ("x^2 = 4", "4"), ("2x = 4", "4"),
    ("x + y + z = 0", "0"), (r"x \ge 3", "3"), (r"x \ge 3", r"x \le 3"), ("x > 4", r"x \ge 4"),
    ("x = 3, y = 4", "x = 4, y = 3"), ("5cm", "5m"), ("5cm", "5 km"), ("5cm^2", "5 cm"), ("5 s", "5 h"),
    ("5 ft", "5 inches"), (r"\$5", "5 cents"), ("2x", "2"), ("2ab", "2"), ("4t", "4"), ("5m", "5"),
    ("3pi", "3"), ("2 or", "2"), ("2 thirds", "2"), ("3 or more", "3"), (r"2\pi rh", r"2\pi"),
    ("10 am", "10 pm"), (r"5^\circ\text{C}", r"5^\circ\text{F}"), ("1,000", "(1,000)"), ("1,000", "1, 000"),
    ("1{,}2", "12"), ("10 000", "1 0000"), (r"\log_2 128", r"\log_21 28"), ("1 1/2", "11/2"),
    ("3 4/5", "34/5"), ("2 3", "23"), ("1,1,2", "1,2,2"), ("x^{2n}", "x^2n"), ("x^{2}3", "x^{23}"),
    (r"2\frac{-a}{3}", r"2-\frac{a}{3}"), (r"\frac{-1+\sqrt7}{2}", r"-\frac{1+\sqrt7}{2}"),
    ("1011_2", "1011"), ("1011_2", "1011_3"), (r"1 \pm \sqrt2", r"1 + \sqrt2"), ("[0,1)", "(0,1)"),
    (r"\sqrt{2}", "1.4142135"), ("5-", "5"), ("f'", "f"), (r"\text{}", "5"), ("0^{-1}", "0"),
    # Number words make another number.
    ("2 lakh", "2"), ("5 lakhs", "5"), ("2 lakh rupees", "2"), ("3 crore", "3"), ("3 gross", "3"),
    ("5 grand", "5"), ("5 bn", "5"), ("5 mil", "5"), ("4 tens", "4"), ("10 thousandths", "10"),
    ("7 tenths", "7"), ("5 fifths", "5"), ("7 hundredths", "7"), ("10 millionths", "10"),
    ("3 fifths of it", "3"), ("2 thousandths of an inch", "2"), ("7 eighths", "7"), ("4 halves", "4"),
    ("3 quarters", "3"), ("3 quarters of a mile", "3"), ("1 lakh", "1"),
    # So do letters, symbols and functions.
    (r"6\,ab", "6"), (r"6\,cd", "6"), (r"6\,xyz", "6"), ("5 xy", "5"), ("1 ab", "1"), ("1/2 abc", "1/2"),
    (r"3\text{ pi}", "3"), ("5 pi", "5"), (r"6 \text{ pi cm}", "6"), ("4 theta", "4"), ("3 alpha", "3"),
    ("5 sqrt", "5"), ("5 squared", "5"), ("6 squared cm", "6"), ("4 cubed", "4"), ("5 factorial", "5"),
    ("3 mod", "3"), ("5 doubled", "5"), ("5 minus", "5"), ("5 minus x", "5"), ("8 divided", "8"),
    ("101 in base two", "101"), ("101 in binary", "101"),
    # Comparisons leave the number open.
    ("20 more than Tom", "20"), ("5 more", "5"), ("5 more apples", "5"), ("5 apples more than Tom", "5"),
    ("5 less", "5"), ("20 dollars less", "20"), ("5 fewer", "5"), ("5 apples fewer", "5"), ("5 times", "5"),
    ("5 times as many", "5"), ("5 times more", "5"), ("5 inches taller", "5"),
    ("5 years older than Tom", "5"), ("5 points higher", "5"), ("20 degrees below zero", "20"),
    ("3 percent less", "3"), ("20 percent more", "20"), ("1/2 more", "1/2"), ("5 until noon", "5"),
    ("5 to noon", "5"), ("5 before noon", "5"),
    # A quotient of units has an order; ratios and times are no quotients.
    ("5 m/s", "5 s/m"), ("5/2 m/s", "5/2 s/m"), ("5 km/h", "5 h/km"), ("5 kg/m^3", "5 kg m^3"),
    ("5 dollars per apple", "5 apples per dollar"), ("3:2", "1.5"), ("3:2", "3/2"), ("3:2", r"\frac{3}{2}"),
    ("6:4", "1.5"), ("1:2", "0.5"), ("2:1", "2"), ("1:1", "1"), ("3 : 1", "3"), ("0:1", "0"),
    ("1:2:3", "1:3:2"), ("10:30", "10/30"), ("10:30", "1:3"), ("7/2 : 1", "3.5"),
    # Always so, and not to be lost.
    ("3 dozen eggs", "3"), ("twice 5", "5"), ("half of 12", "12"), ("3 point 5", "3"), ("10 out of 12", "10"),
    ("5 ft 3 in", "5"), ("7 days and 4 hours", "7"), ("2 and a half", "2"), ("5 to 8", "5"),
    ("at least 5", "5"), ("5 m/s", "5 m"), ("5 m/s^2", "5 m/s"), ("\u20ac5", "\u00a35"),
    ("18 apples", "18 oranges"), ("2:30 pm", "2:30 am"), ("2x=4", "4"), ("x+1=5", "5"), ("3+4=8", "7"),
    ("3+4=7", "8"), (r"2\theta = 60", "60"), ("5 = x", "y = 5"), (r"18 \pmod{20}", r"18 \pmod{21}"),
    (r"38 \bmod 20", "38"), ("100,200,300", "100, 200, 301"), ("100200300", "100, 200, 300"),
    ("1,000", "1, 0"), (r"\color{red}{18}", "19"), ("about 8", "9"),
]


@pytest.mark.parametrize("solution, answer", RIGHT)
def test_answers_that_are_right(solution, answer):
    assert is_correct(solution, answer)


@pytest.mark.parametrize("solution, answer", WRONG)
def test_answers_that_are_wrong(solution, answer):
    assert not is_correct(solution, answer)


@pytest.mark.parametrize("one, other", SAME)
def test_ways_to_write_one_answer(one, other):
    assert is_correct(box(one), other) and is_correct(box(other), one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_answers_that_only_look_alike(one, other):
    assert not is_correct(box(one), other) and not is_correct(box(other), one)


LETTERS = [chr(0x4e00 + i) for i in range(149)]
HOSTILE_ANSWERS = [
    (NINES, NINES + "1"), ("9" * 280, "9" * 279 + "8"), ("9" * 140 + "/9", "9" * 140), ("9^99", "9^98"),
    ("(" * 10000, "(" * 9999), ("(" * 149 + ")" * 149, "(" * 149 + ")" * 148), ("x=" * 140 + "1", "x=" * 140),
    (",".join(LETTERS), ",".join(LETTERS[::-1])), (",".join(LETTERS), ",".join(LETTERS[:0:-1]) + ",1"),
    ("{1," * 70 + "2" + "}" * 70, "{1," * 70 + "2.0" + "}" * 70), ("x " * 149 + "= 1", "x " * 149),
    (r"\abc" * 70, r"\abc" * 70 + "d"), (r"\frac{" * 40 + "}" * 40, r"\frac{" * 39 + "}" * 39),
    ("1" + " " * 10**6 + "cm", "1" + " " * 10**6 + "m"), (r"\text{" * 10**5 + "}" * 10**5, "1"),
]


@pytest.mark.parametrize("one, other", HOSTILE_ANSWERS, ids=range(len(HOSTILE_ANSWERS)))
def test_hostile_answers_take_no_long_time(one, other, monkeypatch):
    monkeypatch.setattr(grading, "_worker", False)
    for solution in (box(one), "The answer is: " + one):
        began = time.monotonic()
        is_correct(solution, other)
        assert time.monotonic() - began < 2


HOSTILE_TEXTS = [text + "5" for text in (
    "answer is " * 10**5, "answer (" * 10**5, "the answer to " * 10**5, "#" * 10**6, "$1" * 10**5,
    "\n" * 10**6, "The answer is " + "x" * 10**6, "The answer is not " + "a " * 10**6,
    "The answer is " + "! " * 10**5, "The answer is 1 (" + "aaa " * 20 + "(" * 10**5,
    "The answer is " + "therefore " * 10**5, "The answer is $$" + "\n" * 10**6,
    "<b>" * 10**5 + "answer is " + "<b>" * 10**5,
)]


@pytest.mark.parametrize("solution", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_an_answer_is_found_in_no_long_time(solution):
    began = time.monotonic()
    grading.extract_answer(solution)
    assert time.monotonic() - began < 2


def test_no_answer_makes_the_grader_fail_and_it_matters_not_which_is_the_guess(monkeypatch):
    monkeypatch.setattr(grading, "_worker", False)
    chance = random.Random(0)
    tokens = r"\frac \sqrt \pi \cup \in \pm \\ & , , = + - / ^ _ ( ) [ ] \{ \} { } $ % 0 1 12 000 x".split()
    tokens += [r"\frac{1}{2}", r"\text{ cm}", MATRIX, "(1,2)", "1,000", "5cm", " ", " or ", "\ud800"]
    for _ in range(3000):
        one, other = ("".join(chance.choices(tokens, k=chance.randint(1, 9))) for _ in range(2))
        is_correct(one, other)
        if all(grading.extract_answer(box(text)) == text.strip() for text in (one, other)):  # braces match
            assert is_correct(box(one), other) == is_correct(box(other), one), (one, other)
            assert is_correct(box(one), one) or not grading._rewritten(one), one


def test_formulas_are_compared_by_math_verify_within_a_time_limit(monkeypatch):
    pytest.importorskip("math_verify", reason="optional: pip install math-verify")
    for guess, answer, right in [("1+2x", "2x+1", True), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
                                 ("(x+1)^2", "x^2+2x+1", True), ("x^2+1", "x^2+2", False),
                                 ("2^{10}", "1024", True),
                                 (r"\frac{\pi}{2}", r"\pi/2", True), ("2ab", "2ba", True),
                                 (r"\begin{pmatrix} 1+x \\ 2 \end{pmatrix}",
                                  r"\begin{pmatrix} x+1 \\ 2 \end{pmatrix}", True)]:
        assert is_correct(box(guess), answer) == right, guess
    began = time.monotonic()
    assert not is_correct(box("9^{9^{9^9}}"), "9^{9^{8^9}}")
    assert time.monotonic() - began < 10
    grading._worker.kill()  # one answer cannot be compared then, and after that a new worker is there
    assert not is_correct(box("3+x"), "x+3") and is_correct(box("3+x"), "x+3")
    began = time.monotonic()
    monkeypatch.setattr(grading, "SECONDS", 2)  # for all members of a list together
    assert not is_correct(box("9^{9^9}x, " * 9 + "1"), "9^{9^8}x, " * 9 + "1")
    assert time.monotonic() - began < 10
    hangs = "import sys, time\nsys.stdin.readline()\ntime.sleep(60)"
    monkeypatch.setattr(grading, "WORKER", hangs), monkeypatch.setattr(grading, "_worker", None)
    assert not grading._same_formula("a", "b", seconds=0.2) and grading._worker is None


def test_without_math_verify_the_rest_works_and_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(grading, "_worker", None)
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    assert is_correct(box("1/2"), "0.5") and not capsys.readouterr().err
    assert not is_correct(box("1+2x"), "2x+1") and not is_correct(box("1+3x"), "3x+1")
    assert capsys.readouterr().err.count("pip install math-verify") == 1


def test_gain_is_paired_by_problem():
    # 10 of 100 changed, all for the better: the standard error is sqrt(0.1 * 0.9 / 100) = 0.03
    gain = paired_gain([True] * 50 + [False] * 50, [True] * 60 + [False] * 40)
    assert gain == pytest.approx((0.1, 0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03))
