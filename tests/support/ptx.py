"""The text of a compiled GPU kernel (PTX) as its flow of control: what is before an instruction on every way to it."""

import re


class Flow:
    """The instructions of the kernel in a PTX text, and which of them may run just before each."""

    def __init__(self, text):
        self.instructions, labels, scopes, scope, opened = [], {}, [], (), 0
        for line in text.split(".entry", 1)[1].splitlines():
            # Braces that stand alone are scopes: labels of inline assembly are found in their own.
            line = line.split("//")[0].strip()
            if line == "{":
                opened += 1
                scope = (*scope, opened)
            elif line == "}":
                scope = scope[:-1]
            elif match := re.fullmatch(r"([\w$]+):", line):
                labels[scope, match[1]] = len(self.instructions)
            elif line:
                self.instructions.append(line)
                scopes.append(scope)

        def target(index, name):
            scope = scopes[index]
            while (scope, name) not in labels:
                scope = scope[:-1]
            return labels[scope, name]

        self.before = [[] for _ in self.instructions]
        for index, instruction in enumerate(self.instructions):
            following = []
            if match := re.search(r"\bbra(?:\.uni)?\s+([\w$]+);", instruction):
                following.append(target(index, match[1]))
            if not re.match(r"(bra|ret|exit|trap)\b", instruction):
                following.append(index + 1)
            for each in following:
                if each < len(self.before):
                    self.before[each].append(index)

    def find(self, pattern):
        """The numbers of the instructions that match."""
        return [index for index, instruction in enumerate(self.instructions) if re.search(pattern, instruction)]

    def unguarded(self, start, guards, access):
        """The numbers of instructions `access` from which some way leads to `start` without all the guards in order."""
        found, seen, todo = set(), set(), [(each, len(guards)) for each in self.before[start]]
        while todo:
            index, missing = state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            instruction = self.instructions[index]
            if re.search(guards[missing - 1], instruction):
                missing -= 1
            elif re.search(access, instruction):
                found.add(index)
            if missing and index not in found:
                todo += [(each, missing) for each in self.before[index]]
        return found

    def leads(self, start, end):
        """Whether some way leads from one instruction to another, or back to itself."""
        seen, todo = set(), list(self.before[end])
        while todo:
            index = todo.pop()
            if index not in seen:
                seen.add(index)
                todo += self.before[index]
        return start in seen
