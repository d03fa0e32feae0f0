#include "bpe_tables.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <unordered_set>

#include "flat_map.hpp"
#include "normalizer.hpp"
#include "utf8.hpp"

namespace cpt {

namespace {

constexpr char32_t kSpace = 0x2581;
constexpr std::size_t kLowCharacters = 0x10000;
constexpr int kBitsPerJoin = 16;  // in the table of pairs: about 6 % of those that never join are taken for joins

// Which stretches of a text are pieces of several characters: by hashes of all of its prefixes, from which those of
// all stretches follow.
class TextTable {
 public:
  explicit TextTable(std::size_t texts) : texts_(texts), symbols_(texts) {}

  // Throws std::invalid_argument where another text has the same hash.
  void add(std::u32string_view text, Symbol symbol) {
    look_into(text);
    texts_[symbol] = text;
    if (symbols_.put(prefixes_.back(), symbol) != symbol) throw std::invalid_argument("two of its pieces have one hash");
  }

  // Sets the text that `find` speaks of.
  void look_into(std::u32string_view text) {
    text_ = text;
    prefixes_.assign(1, 0);
    for (const char32_t code : text) prefixes_.push_back(prefixes_.back() * kFactor + code + 1);
    while (powers_.size() < prefixes_.size()) powers_.push_back(powers_.back() * kFactor);
  }

  // The symbol of the stretch between two places; kNoSymbol where it is not a piece.
  Symbol find(std::size_t from, std::size_t to) const {
    const Symbol symbol = symbols_.find(prefixes_[to] - prefixes_[from] * powers_[to - from]);
    return symbol != FlatMap::kNone && texts_[symbol] == text_.substr(from, to - from) ? symbol : kNoSymbol;
  }

 private:
  static constexpr std::uint64_t kFactor = 0xd1342543de82ef95u;
  static_assert(FlatMap::kNone == kNoSymbol);

  std::vector<std::u32string_view> texts_;  // of the symbols
  FlatMap symbols_;                         // by hash
  std::u32string_view text_;
  std::vector<std::uint64_t> prefixes_;     // hashes, that of the empty one first
  std::vector<std::uint64_t> powers_{1};
};

unsigned log2_above(std::size_t count) {
  unsigned bits = 6;
  while ((std::size_t{1} << bits) < count) ++bits;
  return bits;
}

bool is_text(PieceType type) { return type == PieceType::kNormal || type == PieceType::kUnused; }

// The form in which spaces are cut: see Normalizer.
std::string spaced(std::string text) {
  for (std::size_t at; (at = text.find(kSpaceSymbol)) != std::string::npos;) {
    text.replace(at, kSpaceSymbol.size(), " ");
  }
  return text;
}

}  // namespace

BpeTables::BpeTables(const std::vector<Piece>& pieces, bool byte_fallback, bool escape_whitespaces)
    : byte_fallback_(byte_fallback), vocab_size_(pieces.size()), low_(kLowCharacters, kNoSymbol),
      pages_(0x1100, 0), merges_({}) {
  high_.emplace_back().fill(kNoSymbol);
  read_specials(pieces, escape_whitespaces);
  std::u32string characters;
  const std::vector<Entry> entries = read_entries(pieces, escape_whitespaces, characters);
  const auto is_long = [](const Entry& entry) { return entry.text.size() > 1; };
  const auto long_entries = static_cast<std::size_t>(std::count_if(entries.begin(), entries.end(), is_long));
  first_character_ = static_cast<Symbol>(long_entries);
  add_character(kSpace);
  if (escape_whitespaces) low_[U' '] = low_[kSpace];
  for (const Entry& entry : entries) {
    for (const char32_t code : entry.text) add_character(code);
  }
  const std::size_t symbols = first_character_ + characters_.size();
  if (symbols > MergeTable::kMaxSymbol) throw std::invalid_argument("it has too many pieces");
  add_ranks(entries, long_entries);
  const std::vector<Merge> merges = last_merges(entries, long_entries);
  merges_ = MergeTable(merges);
  fill_joins(entries, merges);
  write_tokens(pieces, entries, merges, long_entries);
}

void BpeTables::read_specials(const std::vector<Piece>& pieces, bool escape_whitespaces) {
  std::unordered_set<std::string_view> reserved;
  std::unordered_set<std::string_view> spelt(pieces.size());
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const Piece& piece = pieces[id];
    if (!utf8::valid(piece.text)) throw std::invalid_argument("a piece is not valid UTF-8");
    if (piece.text.empty()) throw std::invalid_argument("its piece " + std::to_string(id) + " is empty");
    const bool in_text = is_text(piece.type) || piece.type == PieceType::kUserDefined;
    if (!(in_text ? spelt : reserved).insert(piece.text).second) {
      throw std::invalid_argument("its piece " + piece.text + " is there twice");
    }
    const auto number = static_cast<std::uint32_t>(id);
    if (piece.type == PieceType::kUnknown) unknown_ = number;
    if (piece.type == PieceType::kByte) {  // "<0x41>"
      if (piece.text.size() != 6) throw std::invalid_argument("its byte piece " + piece.text + " names no byte");
      byte_tokens_[std::strtoul(piece.text.substr(3, 2).c_str(), nullptr, 16) & 0xff] = number;
    }
    if (piece.type == PieceType::kUserDefined) {
      // A space in it is never met where spaces are escaped before the text is cut.
      if (escape_whitespaces && piece.text.find(' ') != std::string::npos) continue;
      user_defined_.add(escape_whitespaces ? spaced(piece.text) : piece.text, number);
    }
  }
  if (unknown_ == kNoSymbol) throw std::invalid_argument("it has no unknown piece");
  for (const std::string_view text : reserved) {
    if (spelt.count(text) || utf8::count(text) == 1) {
      throw std::invalid_argument("text can spell its control piece " + std::string(text));
    }
  }
}

std::vector<BpeTables::Entry> BpeTables::read_entries(const std::vector<Piece>& pieces, bool escape_whitespaces,
                                                      std::u32string& characters) const {
  std::size_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.text.size();
  characters.reserve(bytes);  // so that it never moves
  std::vector<Entry> entries;
  entries.reserve(pieces.size());
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const Piece& piece = pieces[id];
    if (!is_text(piece.type)) continue;
    if (escape_whitespaces && piece.text.find(' ') != std::string::npos) continue;  // never met, as above
    if (!std::isfinite(piece.score)) throw std::invalid_argument("the score of a piece is not a number");
    const std::size_t start = characters.size();
    const char* at = piece.text.data();
    while (at < piece.text.data() + piece.text.size()) characters.push_back(utf8::decode(at));
    const std::u32string_view text(characters.data() + start, characters.size() - start);
    entries.push_back({static_cast<std::uint32_t>(id), text, piece.type, piece.score});
  }
  const auto before = [](const Entry& a, const Entry& b) {
    const bool a_long = a.text.size() > 1;
    const bool b_long = b.text.size() > 1;
    return a_long != b_long ? a_long : a_long && a.score > b.score;
  };
  if (!std::is_sorted(entries.begin(), entries.end(), before)) {
    std::stable_sort(entries.begin(), entries.end(), before);
  }
  return entries;
}

void BpeTables::add_character(char32_t code) {
  if (character(code) != kNoSymbol) return;
  const auto symbol = static_cast<Symbol>(first_character_ + characters_.size());
  characters_.push_back(code);
  if (code < low_.size()) {
    low_[code] = symbol;
    return;
  }
  std::uint16_t& page = pages_[code >> 8];
  if (page == 0) {
    page = static_cast<std::uint16_t>(high_.size());
    high_.emplace_back().fill(kNoSymbol);
  }
  high_[page][code & 0xff] = symbol;
}

void BpeTables::add_ranks(const std::vector<Entry>& entries, std::size_t long_entries) {
  ranks_.resize(long_entries);
  for (std::size_t k = 0; k < long_entries; ++k) {
    const bool tie = k > 0 && entries[k].score == entries[k - 1].score;
    ranks_[k] = tie ? ranks_[k - 1] : static_cast<std::uint32_t>(k);
    if (tie) first_tie_ = std::min(first_tie_, ranks_[k]);
  }
}

// The one merge that makes each piece. Merging treats a stretch of text the same way whatever stands around it,
// until something is merged across its ends; so a piece always comes about as when its text stands alone, by the
// same last merge. Every other way to put it together never happens, and a piece that is not reached never appears.
std::vector<Merge> BpeTables::last_merges(const std::vector<Entry>& entries, std::size_t long_entries) const {
  TextTable known(long_entries);
  for (std::size_t k = 0; k < long_entries; ++k) known.add(entries[k].text, static_cast<Symbol>(k));
  std::vector<Merge> merges;
  merges.reserve(long_entries);
  std::vector<std::size_t> starts;  // of the symbols in the text, and its end
  std::vector<Symbol> symbols;
  std::vector<Symbol> pairs;  // what each symbol and the next become: the piece with the text of both, if there is one
  for (std::size_t k = 0; k < long_entries; ++k) {
    const std::u32string_view text = entries[k].text;
    known.look_into(text);
    symbols.clear();
    pairs.clear();
    starts.clear();
    for (std::size_t at = 0; at < text.size(); ++at) {
      symbols.push_back(character(text[at]));
      starts.push_back(at);
      if (at > 0) pairs.push_back(known.find(at - 1, at + 1));
    }
    starts.push_back(text.size());
    while (!pairs.empty()) {
      std::size_t best = 0;
      for (std::size_t at = 1; at < pairs.size(); ++at) {
        if (pairs[at] == kNoSymbol) continue;
        if (pairs[best] == kNoSymbol || rank(pairs[at]) < rank(pairs[best])) best = at;
      }
      const Symbol merged = pairs[best];
      if (merged == kNoSymbol) break;
      if (merged == k) merges.push_back({symbols[0], symbols[1], merged});
      const auto behind = static_cast<std::ptrdiff_t>(best + 1);
      symbols[best] = merged;
      symbols.erase(symbols.begin() + behind);
      starts.erase(starts.begin() + behind);
      pairs.erase(pairs.begin() + behind - 1);
      if (best > 0) pairs[best - 1] = known.find(starts[best - 1], starts[best + 1]);
      if (best < pairs.size()) pairs[best] = known.find(starts[best], starts[best + 2]);
    }
  }
  return merges;
}

void BpeTables::fill_joins(const std::vector<Entry>& entries, const std::vector<Merge>& merges) {
  const auto as_cut = [&](char32_t code) { return code == kSpace && low_[U' '] == low_[kSpace] ? U' ' : code; };
  FlatMap hashes;
  for (const Merge& merge : merges) {
    const std::u32string_view text = entries[merge.merged].text;
    for (std::size_t at = 1; at < text.size(); ++at) {
      hashes.put(MergeTable::hash(character(text[at - 1]), character(text[at])), 0);
      const char32_t left = as_cut(text[at - 1]);
      const char32_t right = as_cut(text[at]);
      if (left < 128 && right < 128) ascii_joins_[left][right >> 6] |= std::uint64_t{1} << (right & 63);
    }
  }
  const unsigned bits = log2_above(hashes.size() * kBitsPerJoin);
  joins_.assign((std::size_t{1} << bits) / 64, 0);
  join_shift_ = 64 - bits;
  hashes.for_each_key([this](std::uint64_t hash) {
    const std::uint64_t bit = hash >> join_shift_;
    joins_[bit >> 6] |= std::uint64_t{1} << (bit & 63);
  });
}

void BpeTables::write_tokens(const std::vector<Piece>& pieces, const std::vector<Entry>& entries,
                             const std::vector<Merge>& merges, std::size_t long_entries) {
  const std::size_t symbols = first_character_ + characters_.size();
  tokens_.assign(symbols, kNoSymbol);
  lists_.resize(symbols);
  byte_counts_.assign(symbols, 0);
  std::vector<Symbol> left(long_entries, kNoSymbol);
  std::vector<Symbol> right(long_entries, kNoSymbol);
  for (std::size_t k = 0; k < entries.size(); ++k) {
    const Entry& entry = entries[k];
    if (entry.text.size() == 1) tokens_[character(entry.text[0])] = entry.id;
    if (entry.text.size() > 1 && entry.type == PieceType::kNormal) tokens_[k] = entry.id;
  }
  for (const Merge& merge : merges) {
    if (tokens_[merge.merged] != kNoSymbol) continue;
    left[merge.merged] = merge.left;
    right[merge.merged] = merge.right;
  }
  for (std::size_t symbol = 0; symbol < symbols; ++symbol) {
    if (tokens_[symbol] != kNoSymbol) continue;
    spell(static_cast<Symbol>(symbol), left, right, lists_[symbol]);
    for (const std::uint32_t id : lists_[symbol]) byte_counts_[symbol] += pieces[id].type == PieceType::kByte;
  }
}

void BpeTables::spell(Symbol symbol, const std::vector<Symbol>& unused_left, const std::vector<Symbol>& unused_right,
                      std::vector<std::uint32_t>& ids) const {
  if (tokens_[symbol] != kNoSymbol) {
    ids.push_back(tokens_[symbol]);
  } else if (symbol < first_character_) {
    if (unused_left[symbol] == kNoSymbol) return;  // no merge makes it
    spell(unused_left[symbol], unused_left, unused_right, ids);
    spell(unused_right[symbol], unused_left, unused_right, ids);
  } else if (!byte_fallback_) {
    ids.push_back(unknown_);
  } else {
    std::string bytes;
    utf8::append(bytes, characters_[symbol - first_character_]);
    for (const char byte : bytes) ids.push_back(byte_tokens_[static_cast<unsigned char>(byte)]);
  }
}

}  // namespace cpt
