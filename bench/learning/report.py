"""stub for now"""


def write(r):
    print(r)
