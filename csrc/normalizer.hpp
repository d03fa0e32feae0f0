// What a SentencePiece model does to a text before it is cut into pieces.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "prefix_set.hpp"

namespace cpt {

inline constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";  // U+2581, as pieces write a space

// The table of replacements a model carries: a double-array trie and the texts it points to.
// Layout after darts-clone (Yata 2008): size of the trie in bytes (u32), its units (u32 each), texts ended by NUL.
class CharsMap {
 public:
  // Raises std::invalid_argument where the table cannot be one.
  explicit CharsMap(std::string_view table);

  bool empty() const { return units_.empty(); }

  // Whether some rule begins with `byte`.
  bool begins(unsigned char byte) const;

  // The longest rule that `text` begins with: how many bytes it takes (0: none) and what it puts there.
  std::size_t match(std::string_view text, std::string_view& replacement) const;

 private:
  std::vector<std::uint32_t> units_;
  std::string texts_;
};

struct NormalizerSettings {
  std::string charsmap;  // empty: none
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
  bool whitespace_as_suffix = false;
};

// Turns a text into the form that is cut. Where spaces are escaped, a space stands in that form for U+2581:
// the two are the same symbol from there on, and a space is the shorter one.
class Normalizer {
 public:
  // `protected_texts` are passed through as they stand (user-defined symbols).
  Normalizer(const NormalizerSettings& settings, const std::vector<std::string>& protected_texts);

  // Replaces the content of `normal`. `text` must be valid UTF-8.
  void operator()(std::string_view text, std::string& normal) const;

 private:
  struct Step {
    std::string_view replacement;
    std::size_t taken;
  };
  Step next(std::string_view text) const;
  void append(std::string_view text, std::string& normal) const;
  void rewrite(std::string_view text, std::string& normal) const;

  NormalizerSettings settings_;
  CharsMap charsmap_;
  PrefixSet protected_;
  std::array<bool, 256> plain_{};  // bytes that stand for themselves, wherever they are
  bool copies_ = false;            // nothing is rewritten
};

}  // namespace cpt
