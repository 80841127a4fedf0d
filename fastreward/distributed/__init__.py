"""Operations whose rows are split over the ranks of a process group."""
