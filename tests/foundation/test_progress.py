from capgap.progress import Bar, sharing_the_screen


def test_outside_a_terminal_a_bar_is_lines(capsys):
    with Bar("counting", 4) as bar:
        bar.to(1)  # within ten seconds of the start: no line yet
        bar.to(4, "all of them")
    assert capsys.readouterr().err == "counting: 100% all of them\n"


def test_where_the_screen_is_shared_there_are_only_lines_on_the_way(capsys):
    with sharing_the_screen(every=0.0), Bar("counting", 4) as bar:
        bar.to(1, "one")
        bar.to(2)
    assert capsys.readouterr().err == "counting:  25% one\ncounting:  50%\n"
    with sharing_the_screen(), Bar("counting", 4) as bar:
        bar.to(4)
    assert not capsys.readouterr().err
    with sharing_the_screen(every=0.0), Bar("counting", 4, quiet=True) as bar:
        bar.to(1)
    assert not capsys.readouterr().err
