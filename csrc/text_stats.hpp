// What the rules of cleaning look at: figures of one text, all in one visit.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "character_kinds.hpp"
#include "ngrams.hpp"
#include "utf8.hpp"

namespace cpt {

// Sizes are in code points where nothing else is said. A share is of the visible characters (all but white
// space) where its comment names nothing else; of nothing it is 0.
struct TextMetrics {
  double bytes = 0, characters = 0;
  double words = 0;      // runs of visible characters
  double lines = 0;      // that hold a visible character
  double sentences = 0;  // see TextMeter::find_sentences
  double word_length_mean = 0, word_length_max = 0;
  double line_length_mean = 0;
  double sentence_length_mean = 0, sentence_length_max = 0;
  double letter_share = 0, latin_share = 0, other_letter_share = 0;
  double digit_share = 0, punctuation_share = 0, symbol_share = 0, control_share = 0;
  double japanese_characters = 0;  // kana, kanji, and the full-width stops and commas
  double japanese_share = 0;
  double hiragana_of_japanese = 0, katakana_of_japanese = 0, kanji_of_japanese = 0;  // of japanese_characters
  double hangul_share = 0;  // with all jamo
  double loose_jamo_share = 0, conjoining_jamo_share = 0;
  double alphabetic_word_share = 0;  // of the words
  double stop_words = 0;             // how many of the profile's stop words occur
  double ellipsis_sentence_share = 0, ellipsis_line_share = 0, bullet_line_share = 0;
  double ended_line_share = 0;  // of the lines: those that end as sentences do
  double hash_word_ratio = 0, ellipsis_word_ratio = 0;  // per word
  double link_share = 0;
  double longest_run = 0;  // of one visible character
  double run_share = 0;    // in runs of kLongRun and more
  double duplicate_lines = 0, duplicate_line_characters = 0;          // of lines, of their characters
  double duplicate_sentences = 0, duplicate_sentence_characters = 0;  // of sentences, of their characters
  double top_2gram = 0, top_3gram = 0, top_4gram = 0;  // of the n-grams of characters: the commonest one
  double repeated_5gram = 0, repeated_6gram = 0, repeated_7gram = 0;  // of the different n-grams: those that
  double repeated_8gram = 0, repeated_9gram = 0, repeated_10gram = 0;  // occur more than once
  double top_2words = 0, top_3words = 0, top_4words = 0;  // characters in the commonest n words, if repeated
  double repeated_5words = 0, repeated_6words = 0, repeated_7words = 0;  // characters in n words in a row that
  double repeated_8words = 0, repeated_9words = 0, repeated_10words = 0;  // occur more than once
};

class TextMeter {
 public:
  static constexpr std::size_t kLongRun = 5;

  // N-grams take most of the time: those that are not wanted stay 0. Stop words are in lower case.
  TextMeter(const std::vector<std::string_view>& stop_words, bool ngrams, bool word_ngrams)
      : wants_ngrams_(ngrams), wants_word_ngrams_(word_ngrams) {
    for (const std::string_view word : stop_words) {
      std::uint64_t hash = kSeed;
      for (const char* at = word.data(); at < word.data() + word.size();) hash = step(hash, utf8::decode(at));
      stop_words_.emplace(hash, stop_words_.size());
    }
  }

  // `text` is valid UTF-8.
  TextMetrics measure(std::string_view text) {
    now_ = {};
    now_.bytes = static_cast<double>(text.size());
    points_.clear();
    seen_.clear();
    const Characters& characters = Characters::table();
    for (const char* at = text.data(); at < text.data() + text.size();) {
      points_.push_back(utf8::decode(at));
      seen_.push_back(characters(points_.back()));
    }
    count_characters();
    count_words();
    count_lines();
    count_sentences();

    if (wants_ngrams_) count_ngrams();
    if (wants_word_ngrams_) count_word_ngrams();
    return now_;
  }

 private:
  struct Span {
    std::size_t begin, end;
    std::size_t size() const { return end - begin; }
  };

  static constexpr std::uint64_t kSeed = 0x2545f4914f6cdd1dULL;

  static constexpr std::uint32_t kEllipsis = 0x2026, kTwoDots = 0x2025, kMiddleDot = 0x30fb, kEnDash = 0x2013;

  static std::uint64_t step(std::uint64_t hash, std::uint32_t point) {
    return ((hash << 5 | hash >> 59) ^ point) * 0x9e3779b97f4a7c15ULL;
  }

  static double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

  bool visible(std::size_t at) const { return seen_[at].visible(); }

  Span trim(Span span) const {
    while (span.begin < span.end && !visible(span.begin)) ++span.begin;
    while (span.begin < span.end && !visible(span.end - 1)) --span.end;
    return span;
  }

  bool ends_in_ellipsis(Span span) const {
    if (span.size() >= 3 && points_[span.end - 1] == '.' && points_[span.end - 2] == '.' &&
        points_[span.end - 3] == '.')
      return true;
    if (!span.size()) return false;
    const std::uint32_t last = points_[span.end - 1];
    return last == kEllipsis || last == kTwoDots || last == kMiddleDot;
  }

  void count_characters() {
    std::array<std::size_t, kNumKinds> counts{};
    std::size_t run = 0, longest = 0, in_runs = 0, in_links = 0, linked_until = 0;
    for (std::size_t at = 0; at < points_.size(); ++at) {
      ++counts[static_cast<std::size_t>(seen_[at].kind())];
      if (points_[at] == ':' && at >= linked_until) in_links += link_around(at, linked_until);
      run = at && points_[at] == points_[at - 1] ? run + 1 : 1;
      if (!visible(at)) continue;
      longest = std::max(longest, run);
      if (run >= kLongRun) in_runs += run == kLongRun ? kLongRun : 1;
    }
    const auto of = [&counts](Kind kind) { return static_cast<double>(counts[static_cast<std::size_t>(kind)]); };
    now_.characters = static_cast<double>(points_.size());
    visible_ = now_.characters - of(Kind::kSpace);
    const double kana_kanji = of(Kind::kHiragana) + of(Kind::kKatakana) + of(Kind::kKanji);
    const double marks = of(Kind::kJapaneseStop) + of(Kind::kJapaneseComma);
    const double hangul = of(Kind::kHangul) + of(Kind::kLooseJamo) + of(Kind::kConjoiningJamo);
    now_.japanese_characters = kana_kanji + marks;
    now_.japanese_share = share(now_.japanese_characters, visible_);
    now_.hiragana_of_japanese = share(of(Kind::kHiragana), now_.japanese_characters);
    now_.katakana_of_japanese = share(of(Kind::kKatakana), now_.japanese_characters);
    now_.kanji_of_japanese = share(of(Kind::kKanji), now_.japanese_characters);
    now_.hangul_share = share(hangul, visible_);
    now_.loose_jamo_share = share(of(Kind::kLooseJamo), visible_);
    now_.conjoining_jamo_share = share(of(Kind::kConjoiningJamo), visible_);
    now_.latin_share = share(of(Kind::kLatin), visible_);
    now_.other_letter_share = share(of(Kind::kLetter), visible_);
    now_.letter_share = share(kana_kanji + hangul + of(Kind::kLatin) + of(Kind::kLetter), visible_);
    now_.digit_share = share(of(Kind::kDigit), visible_);
    now_.punctuation_share = share(of(Kind::kPunctuation) + marks, visible_);
    now_.symbol_share = share(of(Kind::kSymbol), visible_);
    now_.control_share = share(of(Kind::kControl), visible_);
    now_.longest_run = static_cast<double>(longest);
    now_.run_share = share(static_cast<double>(in_runs), visible_);
    now_.link_share = share(static_cast<double>(in_links), visible_);
  }

  // Characters of the address whose "://" begins at `colon`; `until` moves to its end.
  std::size_t link_around(std::size_t colon, std::size_t& until) const {
    if (colon + 2 >= points_.size() || points_[colon + 1] != '/' || points_[colon + 2] != '/') return 0;
    const auto ascii_letter = [this](std::size_t at) { return points_[at] < 0x80 && seen_[at].kind() == Kind::kLatin; };
    std::size_t begin = colon;
    while (begin > until && ascii_letter(begin - 1)) --begin;
    until = colon;
    while (until < points_.size() && points_[until] > 0x20 && points_[until] < 0x7f) ++until;
    return until - begin;
  }

  void count_words() {
    words_.clear();
    hashes_.clear();
    std::vector<bool> found(stop_words_.size());
    std::size_t alphabetic = 0, hashes = 0, ellipses = 0, longest = 0;
    for (std::size_t at = 0; at < points_.size();) {
      if (!visible(at)) {
        ++at;
        continue;
      }
      const std::size_t begin = at;
      std::uint64_t hash = kSeed;
      bool has_letter = false;
      for (; at < points_.size() && visible(at); ++at) {
        hash = step(hash, points_[at]);
        has_letter = has_letter || seen_[at].letter();
        hashes += points_[at] == '#';
        ellipses += points_[at] == kEllipsis || (points_[at] == '.' && ends_in_ellipsis({begin, at + 1}));
      }
      alphabetic += has_letter;
      longest = std::max(longest, at - begin);
      words_.push_back({begin, at});
      hashes_.push_back(hash);
      if (has_letter && !stop_words_.empty()) find_stop_word({begin, at}, found);
    }
    now_.words = static_cast<double>(words_.size());
    now_.word_length_mean = share(visible_, now_.words);
    now_.word_length_max = static_cast<double>(longest);
    now_.alphabetic_word_share = share(static_cast<double>(alphabetic), now_.words);
    now_.hash_word_ratio = share(static_cast<double>(hashes), now_.words);
    now_.ellipsis_word_ratio = share(static_cast<double>(ellipses), now_.words);
    now_.stop_words = static_cast<double>(std::count(found.begin(), found.end(), true));
  }

  // A stop word is met without the marks around it, in lower case (ASCII and Latin-1).
  void find_stop_word(Span word, std::vector<bool>& found) const {
    while (!seen_[word.begin].letter()) ++word.begin;
    while (!seen_[word.end - 1].letter()) --word.end;
    std::uint64_t hash = kSeed;
    for (std::size_t at = word.begin; at < word.end; ++at) {
      const std::uint32_t point = points_[at];
      const bool capital = (point >= 'A' && point <= 'Z') || (point >= 0xc0 && point <= 0xde && point != 0xd7);
      hash = step(hash, capital ? point + 0x20 : point);
    }
    const auto entry = stop_words_.find(hash);
    if (entry != stop_words_.end()) found[entry->second] = true;
  }

  void count_lines() {
    lines_.clear();
    std::size_t ellipses = 0, bullets = 0, ended = 0, begin = 0;
    for (std::size_t at = 0; at <= points_.size(); ++at) {
      if (at < points_.size() && points_[at] != '\n') continue;
      const Span line = trim({begin, at});
      begin = at + 1;
      if (!line.size()) continue;
      lines_.push_back(line);
      ellipses += ends_in_ellipsis(line);
      const bool spaced = line.size() > 1 && !visible(line.begin + 1);
      const std::uint32_t first = points_[line.begin];
      bullets += seen_[line.begin].is(Character::kBullet) ||
                 (spaced && (first == '-' || first == '*' || first == kEnDash));
      std::size_t last = line.end;
      while (last > line.begin && seen_[last - 1].is(Character::kCloser)) --last;
      ended += last > line.begin && (seen_[last - 1].is(Character::kStop) || points_[last - 1] == kEllipsis);
    }
    now_.lines = static_cast<double>(lines_.size());
    now_.ellipsis_line_share = share(static_cast<double>(ellipses), now_.lines);
    now_.bullet_line_share = share(static_cast<double>(bullets), now_.lines);
    now_.ended_line_share = share(static_cast<double>(ended), now_.lines);
    now_.line_length_mean = share(count_duplicates(lines_, now_.duplicate_lines, now_.duplicate_line_characters),
                                  now_.lines);
  }

  void count_sentences() {
    sentences_.clear();
    for (const Span& line : lines_) find_sentences(line);
    std::size_t ellipses = 0, longest = 0;
    for (const Span& sentence : sentences_) {
      ellipses += ends_in_ellipsis(sentence);
      longest = std::max(longest, sentence.size());
    }
    now_.sentences = static_cast<double>(sentences_.size());
    now_.sentence_length_max = static_cast<double>(longest);
    now_.ellipsis_sentence_share = share(static_cast<double>(ellipses), now_.sentences);
    const double all = count_duplicates(sentences_, now_.duplicate_sentences, now_.duplicate_sentence_characters);
    now_.sentence_length_mean = share(all, now_.sentences);
  }

  // A sentence ends with its line, or with a run of stops and the brackets and quotes that close after it;
  // a run of ASCII stops alone ends it only where white space or a character beyond ASCII follows.
  void find_sentences(Span line) {
    std::size_t begin = line.begin;
    for (std::size_t at = line.begin; at < line.end;) {
      if (!seen_[at].is(Character::kStop)) {
        ++at;
        continue;
      }
      bool ends = false;
      for (; at < line.end && seen_[at].is(Character::kStop); ++at) ends = ends || points_[at] >= 0x80;
      while (at < line.end && seen_[at].is(Character::kCloser)) ++at;
      if (at < line.end && !ends && visible(at) && points_[at] < 0x80) continue;
      sentences_.push_back(trim({begin, at}));
      begin = at;
    }
    const Span rest = trim({begin, line.end});
    if (rest.size()) sentences_.push_back(rest);
  }

  // Of texts that occur more than once all but the first are duplicates. Returns the characters of all.
  double count_duplicates(const std::vector<Span>& spans, double& of_spans, double& of_characters) {
    counter_.reset(spans.size());
    std::size_t duplicates = 0, duplicated = 0, all = 0;
    for (const Span& span : spans) {
      std::uint64_t hash = kSeed;
      for (std::size_t at = span.begin; at < span.end; ++at) hash = step(hash, points_[at]);
      const bool again = counter_.count(counter_.add(hash >> 1)) > 1;
      duplicates += again;
      duplicated += again ? span.size() : 0;
      all += span.size();
    }
    of_spans = share(static_cast<double>(duplicates), static_cast<double>(spans.size()));
    of_characters = share(static_cast<double>(duplicated), static_cast<double>(all));
    return static_cast<double>(all);
  }

  void count_ngrams() {
    double* const top[] = {&now_.top_2gram, &now_.top_3gram, &now_.top_4gram};
    double* const repeated[] = {&now_.repeated_5gram, &now_.repeated_6gram, &now_.repeated_7gram,
                                &now_.repeated_8gram, &now_.repeated_9gram, &now_.repeated_10gram};
    walk_.begin(points_.data(), points_.size());
    for (std::size_t n = 2; n <= 10; ++n) {
      const NgramWalk::Level level = walk_.next();
      if (n < 5) {
        *top[n - 2] = share(static_cast<double>(level.most), static_cast<double>(level.total));
      } else {
        *repeated[n - 5] = share(static_cast<double>(level.repeated), static_cast<double>(level.distinct));
      }
    }
  }

  void count_word_ngrams() {
    double* const top[] = {&now_.top_2words, &now_.top_3words, &now_.top_4words};
    double* const repeated[] = {&now_.repeated_5words, &now_.repeated_6words, &now_.repeated_7words,
                                &now_.repeated_8words, &now_.repeated_9words, &now_.repeated_10words};
    const std::size_t size = std::min(words_.size(), NgramWalk::kLongest);
    counter_.reset(size);
    symbols_.resize(size);
    ends_.assign(1, 0);  // visible characters up to each word
    for (std::size_t k = 0; k < size; ++k) {
      symbols_[k] = counter_.add(hashes_[k] >> 1);
      ends_.push_back(ends_.back() + words_[k].size());
    }
    const double all = static_cast<double>(ends_.back());
    walk_.begin(symbols_.data(), size);
    for (std::size_t n = 2; n <= 10; ++n) {
      walk_.next();
      if (n < 5) {
        *top[n - 2] = share(commonest_words(), all);
      } else {
        *repeated[n - 5] = share(characters_in_repeats(), all);
      }
    }
  }

  // Of the n words in a row that occur most often (of several, the longest): occurrences times characters,
  // at most all there are (they may overlap).
  double commonest_words() const {
    std::pair<std::size_t, std::size_t> best{0, 0};
    for (const NgramWalk::Place& place : walk_.repeats())
      best = std::max(best, {walk_.count(place), ends_[place.at + walk_.n()] - ends_[place.at]});
    return static_cast<double>(std::min(best.first * best.second, ends_.back()));
  }

  double characters_in_repeats() const {
    std::size_t covered = 0, until = 0;
    for (const NgramWalk::Place& place : walk_.repeats()) {
      const std::size_t end = place.at + walk_.n();
      covered += ends_[end] - ends_[std::max<std::size_t>(place.at, until)];
      until = end;
    }
    return static_cast<double>(covered);
  }

  bool wants_ngrams_, wants_word_ngrams_;
  TextMetrics now_;
  double visible_ = 0;
  std::unordered_map<std::uint64_t, std::size_t> stop_words_;
  std::vector<std::uint32_t> points_;
  std::vector<Character> seen_;
  std::vector<Span> words_, lines_, sentences_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::uint32_t> symbols_;
  std::vector<std::size_t> ends_;
  KeyCounter counter_;
  NgramWalk walk_;
};

}  // namespace cpt
